"""The whole path with real processes: train on a folder, serve the bundle, ask the service."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client import AsyncClient, Client, ImageRejected, ItemNotFound, ModelMismatch
from trainer.representation.bundle import BundleGallery, open_bundle
from trainer.representation.neighbours import exact_graph, exact_neighbours
from trainer.representation.preprocess import prepare
from trainer.representation.propagation import propagate

Serve = Callable[[Path, Path], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def url(bundle: Path, serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service whose gallery nobody changes."""
    with serve(bundle, tmp_path_factory.mktemp("read") / "state") as url:
        yield url


@pytest.fixture
def service(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def gallery(bundle: Path) -> BundleGallery:
    return open_bundle(bundle).gallery()


def test_items__are_the_files_of_the_folder(
    service: Client, pictures: Path, gallery: BundleGallery
) -> None:
    files = {
        path.relative_to(pictures).as_posix()
        for path in pictures.rglob("*")
        if path.suffix in (".png", ".jpg")
    }
    assert len(files) == 48
    assert {item.id for item in service.items(page_size=7)} == files == set(gallery.ids)


def test_embed__of_a_training_file_is_its_vector_in_the_bundle(
    service: Client, pictures: Path, gallery: BundleGallery
) -> None:
    found = service.embed([pictures / item_id for item_id in gallery.ids])
    np.testing.assert_allclose(found.embeddings, gallery.embeddings, atol=1e-5)


def test_embed__every_kind_of_input_gives_the_same(
    service: Client, pictures: Path, bundle: Path, gallery: BundleGallery
) -> None:
    item_id = next(i for i in gallery.ids if i.endswith(".png"))
    path, wanted = pictures / item_id, gallery.embeddings[gallery.ids.index(item_id)]
    pixels = np.asarray(Image.open(path))
    prepared = prepare(path, open_bundle(bundle).contract)
    with path.open("rb") as file:
        kinds: list[Any] = [str(path), path.read_bytes(), file, Image.open(path), pixels]
        rows = service.embed(kinds).embeddings
    np.testing.assert_allclose(rows, np.broadcast_to(wanted, rows.shape), atol=1e-5)
    rows = service.embed(prepared[None]).embeddings
    np.testing.assert_allclose(rows, wanted[None], atol=1e-5)


def test_embed__a_damaged_picture_is_named_and_can_be_skipped(
    service: Client, pictures: Path, gallery: BundleGallery
) -> None:
    good = pictures / gallery.ids[0]
    images = [good, b"no picture", good]
    with pytest.raises(ImageRejected) as raised:
        service.embed(images)
    assert [error.index for error in raised.value.errors] == [1]
    found = service.embed(images, on_error="skip")
    assert [error.index for error in found.errors] == [1]
    assert list(np.isnan(found.embeddings).any(axis=1)) == [False, True, False]


def test_neighbours__equal_brute_force(service: Client, gallery: BundleGallery) -> None:
    found = service.neighbours(ids=gallery.ids, k=9)
    similarities = gallery.embeddings @ gallery.embeddings.T
    np.fill_diagonal(similarities, -np.inf)
    for row, result in zip(similarities, found.results, strict=True):
        answered = [n.similarity for n in result]
        np.testing.assert_allclose(answered, -np.sort(-row)[:9], atol=1e-6)
        # Each with its own similarity: ids may change places within a rounding of float32 only.
        np.testing.assert_allclose(
            answered, [row[gallery.ids.index(n.id)] for n in result], atol=1e-6
        )
        assert len({n.id for n in result}) == 9


def test_neighbours__of_a_picture_and_of_its_vector_are_the_same(
    service: Client, pictures: Path, gallery: BundleGallery
) -> None:
    by_image = service.neighbours(images=pictures / gallery.ids[5], k=5).results
    by_vector = service.neighbours(vectors=gallery.embeddings[5], k=5).results
    assert by_image[0][0].id == by_vector[0][0].id == gallery.ids[5]
    assert [n.id for n in by_image[0]] == [n.id for n in by_vector[0]]


@pytest.mark.parametrize(("k", "steps"), [(1, 3), (3, 2), (4, 3)])
def test_groups__equal_propagation_on_the_exact_graph(
    service: Client, gallery: BundleGallery, k: int, steps: int
) -> None:
    graph = exact_graph(gallery.embeddings, k + 1)
    if np.min(graph.similarities[:, :-1] - graph.similarities[:, 1:]) < 1e-6:
        pytest.skip("two neighbours of this training are within a rounding of each other")
    graph = exact_graph(gallery.embeddings, k)
    reached = propagate(graph, np.arange(len(gallery.ids)), steps)
    found = service.groups(ids=gallery.ids, k=k, steps=steps, order="step")
    for row, group in zip(reached, found.results, strict=True):
        assert [member.id for member in group.members] == [gallery.ids[i] for i in row if i >= 0]


def test_async_client__answers_the_same(
    service: Client, url: str, pictures: Path, gallery: BundleGallery
) -> None:
    async def ask() -> Any:
        async with AsyncClient(url) as client:
            return await asyncio.gather(
                client.embed(pictures / gallery.ids[0]),
                client.neighbours(ids=gallery.ids[0]),
                client.groups(ids=gallery.ids[0]),
                client.info(),
            )

    embedded, neighbours, groups, info = asyncio.run(ask())
    np.testing.assert_allclose(embedded.embeddings, gallery.embeddings[:1], atol=1e-5)
    assert neighbours == service.neighbours(ids=gallery.ids[0])
    assert groups == service.groups(ids=gallery.ids[0])
    assert info == service.info()


def test_state__survives_a_restart(
    bundle: Path, pictures: Path, serve: Serve, tmp_path: Path, gallery: BundleGallery
) -> None:
    state = tmp_path / "state"
    turned = Image.open(pictures / gallery.ids[3]).rotate(180)
    with serve(bundle, state) as url, Client(url) as service:
        model = service.info().model
        vector = service.embed(turned).embeddings[0]
        added = service.add([turned], ids=["new/ä 1"], metadata=[{"kind": "turned"}])
        assert (added.added, added.updated, added.rejected) == (1, 0, ())
        stored = service.add(vectors=gallery.embeddings[:1], ids="copy", model=model)
        assert stored.added == 1
        with pytest.raises(ModelMismatch):
            service.add(vectors=gallery.embeddings[:1], ids="x", model="another")
        assert service.delete(gallery.ids[7]).deleted == 1
        assert service.delete_items([gallery.ids[8], "never"]).missing == ("never",)
        version = service.info().gallery_version
    with serve(bundle, state) as url, Client(url) as service:
        assert service.info().gallery_version == version
        item = service.item("new/ä 1", include_vector=True)
        assert item.metadata == {"kind": "turned"}
        np.testing.assert_allclose(item.vector, vector, atol=1e-6)
        with pytest.raises(ItemNotFound):
            service.item(gallery.ids[7])
        assert [i.id for i in service.items(filter={"kind": "turned"})] == ["new/ä 1"]

        left = dict(zip(gallery.ids, gallery.embeddings, strict=True))
        del left[gallery.ids[7]], left[gallery.ids[8]]
        left |= {"new/ä 1": vector, "copy": gallery.embeddings[0]}
        ids, rows = list(left), np.stack(list(left.values()))
        wanted = exact_neighbours(rows, rows, 4, exclude=np.arange(len(rows)))
        found = service.neighbours(ids=ids, k=4).results
        for similarities, result in zip(wanted.similarities, found, strict=True):
            np.testing.assert_allclose([n.similarity for n in result], similarities, atol=1e-5)
