"""service.load: a gallery that answers with what was embedded; run again it changes nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service import load
from service.bulk import loading
from service.bulk.parts import Output, Plan
from service.check import Report, check
from service.gallery.database import Database
from service.gallery.protocol import StorageError
from tests.service.conftest import DIM, IMAGES, Service, unit_rows
from trainer.representation.bundle import Bundle

COUNT, PART = 50, 20


def write_vectors(
    directory: Path,
    bundle: Bundle,
    drawn: NDArray[np.float32] | None = None,
    *,
    finish: bool = True,
    **plan: object,
) -> Path:
    """What service.embed leaves, of drawn vectors with the ids new/00, ..."""
    drawn = unit_rows(COUNT, seed=9) if drawn is None else drawn
    numbers = range(0, len(drawn), PART)
    first = Plan(
        bundle.model_id, "embedding", DIM, "fp32", "folder", len(drawn), PART,
        tuple(map(str, numbers)),
    )  # fmt: skip
    with Output(directory, replace(first, **plan)) as output:  # type: ignore[arg-type]
        for number, start in enumerate(numbers):
            rows = drawn[start : start + PART]
            ids = [(f"new/{start + i:02d}", start + i) for i in range(len(rows))]
            output.write(number, ids, rows, [])
        if finish:
            output.finish()
    return directory


def checked(state: Path) -> Report:
    database = Database(state, make=False)
    try:
        return check(database)
    finally:
        database.close()


@pytest.fixture
def run(bundle: Bundle, tmp_path: Path) -> Callable[..., int]:
    """run(directory, state=..., bundle=...) -> the exit code of service.load."""

    def _run(directory: Path, state: str = "state", **named: Path) -> int:
        at = named.get("bundle", bundle.directory)
        return load.main([str(directory), "--bundle", str(at), "--state", str(tmp_path / state)])

    return _run


def test_load__the_gallery_answers_neighbours(
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    start_service: Callable[..., Iterator[Service]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    vectors = unit_rows(COUNT, seed=9)
    assert run(write_vectors(tmp_path / "out", bundle, vectors)) == 0
    assert "50 items added, 0 updated, 0 were there; 90 operations" in capsys.readouterr().out
    everything = np.concatenate([bundle.gallery().embeddings, vectors])
    for service in start_service(tmp_path / "state"):
        assert service.client.get("/info").json()["gallery"]["items"] == COUNT + IMAGES
        asked = {"vectors": vectors[:5].tolist(), "k": 4}
        results = service.client.post("/neighbours", json=asked).json()["results"]
        for row, query in zip(results, vectors[:5], strict=True):
            wanted = np.sort(everything @ query)[::-1][:4]
            np.testing.assert_allclose([each["similarity"] for each in row], wanted, atol=1e-5)
        assert [row[0]["id"] for row in results] == [f"new/{i:02d}" for i in range(5)]
    assert checked(tmp_path / "state").is_sound


def test_load__again_changes_nothing(
    tmp_path: Path, bundle: Bundle, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_vectors(tmp_path / "out", bundle)
    assert run(directory) == 0
    capsys.readouterr()
    assert run(directory) == 0
    assert "0 items added, 0 updated, 50 were there; 90 operations" in capsys.readouterr().out


def test_load__that_was_stopped_goes_on(
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = write_vectors(tmp_path / "out", bundle)
    real = loading.Loader.load

    def failing(self: loading.Loader, part: loading.Part) -> loading.Loaded:
        if part.name == "part-00001":
            raise StorageError("the change was not stored: disk is full", full=True)
        return real(self, part)

    with monkeypatch.context() as patched:
        patched.setattr(loading.Loader, "load", failing)
        assert run(directory) == 1
    assert "disk is full: put this right and run it again" in capsys.readouterr().err
    assert run(directory) == 0
    assert "30 items added, 0 updated, 20 were there" in capsys.readouterr().out


def test_load__replaces_other_vectors_and_leaves_equal_ones_with_their_metadata(
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    start_service: Callable[..., Iterator[Service]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    vectors = unit_rows(COUNT, seed=9)
    lines = [
        {"id": "new/00", "vector": vectors[0].tolist(), "metadata": {"kept": True}},
        {"id": "new/01", "vector": vectors[5].tolist(), "metadata": {"kept": False}},
    ]
    for service in start_service(tmp_path / "state"):
        answer = service.client.post(
            "/items",
            content=b"\n".join(json.dumps(line).encode() for line in lines),
            headers={"Content-Type": "application/x-ndjson"},
        )
        assert answer.json()["added"] == 2
        stored = service.client.get("/items/new/00?include=vector").json()["vector"]
    vectors[0] = np.float32(stored)  # a vector that comes by JSON is brought to unit length again
    assert run(write_vectors(tmp_path / "out", bundle, vectors)) == 0
    assert "48 items added, 1 updated, 1 were there" in capsys.readouterr().out
    for service in start_service(tmp_path / "state"):
        kept = service.client.get("/items/new/00").json()
        replaced = service.client.get("/items/new/01?include=vector").json()
        assert kept["metadata"] == {"kept": True}
        assert replaced["metadata"] == {}
        assert np.array_equal(np.float32(replaced["vector"]), vectors[1])


def test_load__lets_the_pictures_of_replaced_items_go(
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    picture: Callable[..., bytes],
    start_service: Callable[..., Iterator[Service]],
) -> None:
    for service in start_service(tmp_path / "state"):
        answer = service.client.post("/items", files=[("images", ("new/00", picture(1)))])
        assert answer.json()["added"] == 1
    assert run(write_vectors(tmp_path / "out", bundle)) == 0
    report = checked(tmp_path / "state")
    assert report.is_sound, report.problems
    assert report.pictures == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "e" * 64}, "vectors of two models cannot be compared"),
        ({"vectors": "features"}, "a gallery takes embeddings"),
        ({"finish": False}, "3 of 3 parts: run service.embed again"),
    ],
)
def test_load__of_what_does_not_belong_there_is_refused(
    change: dict[str, object],
    message: str,
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(write_vectors(tmp_path / "out", bundle, **change)) == 2  # type: ignore[arg-type]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("spoilt", [2.0, float("nan")])
def test_load__of_a_vector_that_has_no_unit_length_writes_nothing_of_its_part(
    spoilt: float,
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    vectors = unit_rows(COUNT, seed=9)
    vectors[25] *= spoilt
    assert run(write_vectors(tmp_path / "out", bundle, vectors)) == 2
    assert "part-00001: the vector of 'new/25' has the length" in capsys.readouterr().err
    (gallery,) = checked(tmp_path / "state").galleries
    assert gallery.items == IMAGES + PART


def test_load__into_a_state_in_use_or_of_another_model_is_refused(
    tmp_path: Path,
    bundle: Bundle,
    run: Callable[..., int],
    make_bundle: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = write_vectors(tmp_path / "out", bundle)
    assert run(directory) == 0
    database = Database(tmp_path / "state")
    assert run(directory) == 2
    assert "is in use by process" in capsys.readouterr().err
    database.close()
    assert run(directory, bundle=make_bundle(tmp_path / "other", seed=5)) == 2
    assert "holds vectors of model" in capsys.readouterr().err
    monkeypatch.delenv("INVPROP_DATABASE", raising=False)
    assert load.main([str(directory), "--bundle", str(bundle.directory)]) == 2
    assert "give --state DIR, --database URL or both" in capsys.readouterr().err
    monkeypatch.setenv("INVPROP_GALLERY", "milvus://127.0.0.1:19530/photos")
    assert run(directory) == 2
    assert "a gallery in Milvus has no log to load into" in capsys.readouterr().err
    monkeypatch.delenv("INVPROP_GALLERY")
    assert run(tmp_path) == 2
    assert "wanted a directory that python -m service.embed wrote" in capsys.readouterr().err
