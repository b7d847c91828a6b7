"""service.graph_keeper: follows the gallery, keeps a copy on disk, and never serves a wrong one."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from service import graph_keeper
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Item, Snapshot
from service.graph import built_graph
from service.graph_keeper import DIRECTORY, GraphKeeper
from trainer.representation.bundle import Bundle

K = 5
PATIENCE_S = 20.0  # waited only where something is wrong


@contextlib.contextmanager
def kept(state: Path, bundle: Bundle, *, k: int = K) -> Iterator[tuple[LoggedGallery, GraphKeeper]]:
    gallery = LoggedGallery(state, bundle)
    keeper = GraphKeeper(state, neighbours=k)
    keeper.start(gallery)
    try:
        yield gallery, keeper
    finally:
        keeper.close()
        gallery.close()


def change(gallery: LoggedGallery, names: list[str], seed: int = 0) -> None:
    vectors = np.random.default_rng(seed).standard_normal((len(names), 12)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [Item(name, vector, {}) for name, vector in zip(names, vectors, strict=True)]
    gallery.apply(Change(upserts=items)).result(PATIENCE_S)


def assert_current(gallery: LoggedGallery, keeper: GraphKeeper, k: int = K) -> None:
    snapshot = gallery.snapshot()
    graph = keeper.wait_for(snapshot, k, timeout_s=PATIENCE_S)
    assert graph is not None
    fresh = built_graph(snapshot, k, progress=lambda done, total: None)
    np.testing.assert_array_equal(graph.neighbours, fresh.neighbours)
    np.testing.assert_array_equal(graph.similarities, fresh.similarities)
    assert keeper.status()["version"] == snapshot.version


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that were built from nothing, as they are."""
    versions: list[int] = []
    plain = graph_keeper.built_graph

    def noting(snapshot: Snapshot, k: int, **options: Callable[[int, int], None]) -> object:
        versions.append(snapshot.version)
        return plain(snapshot, k, **options)

    monkeypatch.setattr(graph_keeper, "built_graph", noting)
    return versions


def test_keeper__follows_every_change(tmp_path: Path, bundle: Bundle) -> None:
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
        change(gallery, ["a", "b", "train/0003.png"])
        assert_current(gallery, keeper)
        gallery.apply(Change(deletes=["a", "train/0007.png"])).result(PATIENCE_S)
        assert_current(gallery, keeper)
        assert keeper.status()["state"] == "ready"
        assert keeper.graph_of(gallery.snapshot(), K + 1) is None


def test_keeper__has_no_graph_of_a_version_that_is_past(tmp_path: Path, bundle: Bundle) -> None:
    with kept(tmp_path, bundle) as (gallery, keeper):
        old = gallery.snapshot()
        assert_current(gallery, keeper)
        change(gallery, ["a"])
        assert_current(gallery, keeper)
        assert keeper.wait_for(old, K, timeout_s=PATIENCE_S) is None


def test_keeper__takes_many_changes_in_one_step(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[int] = []
    plain = graph_keeper.carried_graph
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)

        def noting(
            old: object, snapshot: Snapshot, **options: Callable[[int, int], None]
        ) -> object:
            if not carried:  # more changes come while the first is worked on
                for n in range(20):
                    change(gallery, [f"more{n}"], seed=n)
            carried.append(snapshot.version)
            return plain(old, snapshot, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(graph_keeper, "carried_graph", noting)
        change(gallery, ["a"])
        while gallery.snapshot().version < 61:
            assert keeper.wait_for(gallery.snapshot(), K, timeout_s=PATIENCE_S) or True
        assert_current(gallery, keeper)
        assert carried == [41, 61]


def test_keeper__reads_its_copy_and_carries_it_on(
    tmp_path: Path, bundle: Bundle, built: list[int]
) -> None:
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
        change(gallery, ["a"])
        assert_current(gallery, keeper)
    assert built == [40]
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
    gallery = LoggedGallery(tmp_path, bundle)  # changed while nobody kept its graph
    change(gallery, ["b", "train/0001.png"])
    gallery.apply(Change(deletes=["a"])).result(PATIENCE_S)
    gallery.close()
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
    assert built == [40]


@pytest.mark.parametrize("name", ["manifest.json", "neighbours.npy", "marks.npy"])
def test_keeper__builds_anew_where_its_copy_is_damaged(
    tmp_path: Path, bundle: Bundle, built: list[int], name: str
) -> None:
    with kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
    path = tmp_path / DIRECTORY / name
    content = bytearray(path.read_bytes())
    if name == "manifest.json":
        del content[-1]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with capture_logs() as logs, kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
    assert built == [40, 40]
    (line,) = [line for line in logs if line["event"] == "graph_rebuilt"]
    assert name in line["reason"]


def test_keeper__refuses_the_graph_of_another_log(
    tmp_path: Path, bundle: Bundle, built: list[int]
) -> None:
    for name, seed in (("one", 1), ("two", 2)):  # the same ids and numbers, other vectors
        with kept(tmp_path / name, bundle) as (gallery, keeper):
            assert_current(gallery, keeper)
            change(gallery, ["a"], seed=seed)
            assert_current(gallery, keeper)
    (tmp_path / "two" / DIRECTORY).rename(tmp_path / "away")
    (tmp_path / "one" / DIRECTORY).rename(tmp_path / "two" / DIRECTORY)
    with capture_logs() as logs, kept(tmp_path / "two", bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["graph_rebuilt"]
    assert built == [40, 40, 41]


def test_keeper__of_another_k_builds_anew(tmp_path: Path, bundle: Bundle, built: list[int]) -> None:
    for k in (K, K + 1):
        with kept(tmp_path, bundle, k=k) as (gallery, keeper):
            assert_current(gallery, keeper, k)
    assert built == [40, 40]


def test_keeper__that_cannot_write_goes_on(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / DIRECTORY).mkdir()
    (tmp_path / DIRECTORY / "of somebody else").touch()
    with capture_logs() as logs, kept(tmp_path, bundle) as (gallery, keeper):
        assert_current(gallery, keeper)
        keeper.close()
    assert {"graph_rebuilt", "graph_not_saved"} <= {line["event"] for line in logs}
    assert (tmp_path / DIRECTORY / "of somebody else").exists()


def test_keeper__that_fails_says_so_and_tries_again_with_the_next_change(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = graph_keeper.built_graph
    failing = True

    def sometimes(snapshot: Snapshot, k: int, **options: Callable[[int, int], None]) -> object:
        if failing:
            raise RuntimeError("broken")
        return plain(snapshot, k, **options)

    monkeypatch.setattr(graph_keeper, "built_graph", sometimes)
    with capture_logs() as logs, kept(tmp_path, bundle) as (gallery, keeper):
        assert keeper.wait_for(gallery.snapshot(), K, timeout_s=PATIENCE_S) is None
        assert keeper.status()["state"] == "failed"
        failing = False
        change(gallery, ["a"])
        assert_current(gallery, keeper)
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["graph_failed"]


def test_keeper__of_no_neighbours_keeps_none(tmp_path: Path, bundle: Bundle) -> None:
    with kept(tmp_path, bundle, k=0) as (gallery, keeper):
        assert keeper.graph_of(gallery.snapshot(), 1) is None
        assert keeper.wait_for(gallery.snapshot(), 1, timeout_s=PATIENCE_S) is None
        assert keeper.status() == {
            "state": "off",
            "neighbours": 0,
            "version": None,
            "size_bytes": 0,
        }
    assert not (tmp_path / DIRECTORY).exists()
