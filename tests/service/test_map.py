"""service.map: PCA by hand, samples that stay, and children that fail, hang or are stopped."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.batching import QueueFull
from service.map import KEPT, Failure, Key, Map, Maps, pca, sampled
from service.map_process import embedded
from tests.service.test_graph import snapshot_of

Units = Callable[..., NDArray[np.float32]]
PATIENCE_S = 20.0  # waited only where something is wrong
# What a child does in place of umap: the first two components.
FAKE = (
    "import io, json, sys, numpy as np\n"
    "vectors = np.load(io.BytesIO(sys.stdin.buffer.read()))\n"
    "{before}\n"
    "out = io.BytesIO(); np.save(out, vectors[:, :2]{after})\n"
    "sys.stdout.buffer.write(out.getvalue())"
)


def maps_of(
    state: Path, before: str = "", after: str = "", *, timeout_s: float = 20, max_pending: int = 2
) -> Maps:
    code = FAKE.format(before=before, after=after)
    return Maps(
        state,
        timeout_s=timeout_s,
        memory_bytes=2**30,
        max_pending=max_pending,
        command=(sys.executable, "-c", code),
    )


@pytest.fixture
def started() -> Iterator[Callable[[Maps], Maps]]:
    running: list[Maps] = []

    def start(maps: Maps) -> Maps:
        maps.start()
        running.append(maps)
        return maps

    yield start
    for maps in running:
        maps.close()


def awaited(maps: Maps, key: object) -> Map | Failure:
    assert isinstance(key, Key)
    for _ in range(int(PATIENCE_S / 0.01)):
        found = maps.look(key)
        if isinstance(found, Map | Failure):
            return found
        assert found == key
        threading.Event().wait(0.01)
    raise AssertionError(key)


def test_pca__by_hand() -> None:
    # Along (1, 1) / sqrt 2 with a spread of 2 and 4 beside the middle, along the other 1.
    along, across = np.asarray([1, 1]) / np.sqrt(2), np.asarray([1, -1]) / np.sqrt(2)
    points = np.asarray([4 * along, -4 * along, across, -across])
    found = pca((points + np.asarray([5, 7])).astype(np.float32))
    np.testing.assert_allclose(np.abs(found), [[4, 0], [4, 0], [0, 1], [0, 1]], atol=1e-5)
    assert found[0, 0] > 0 > found[1, 0]  # the direction's largest component is positive


def test_pca__signs_do_not_depend_on_the_order(random_units: Units) -> None:
    vectors = random_units(50, 6)
    order = np.random.default_rng(3).permutation(50)
    np.testing.assert_allclose(pca(vectors)[order], pca(vectors[order]), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pca__of_next_to_nothing_has_no_false_spread(random_units: Units, count: int) -> None:
    found = pca(random_units(count, 6))
    assert np.abs(found[:, count - 1 :]).max(initial=0) < 1e-6
    np.testing.assert_array_equal(pca(np.repeat(random_units(1, 6), 4, axis=0)), np.zeros((4, 2)))
    assert pca(np.ones((3, 1), np.float32)).shape == (3, 2)


def test_sample__depends_on_the_items_not_on_their_rows(random_units: Units) -> None:
    vectors, seqs = random_units(200, 4), np.arange(1, 201)
    chosen = []
    for main in (200, 0, 77):
        snapshot = snapshot_of(vectors, seqs, 200, main=main)
        chosen.append(snapshot.seqs(sampled(snapshot, 50)).tolist())
    assert chosen[0] == chosen[1] == chosen[2] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 50
    # Spread over all of them, and nearly the same when a few are gone.
    assert 10 < sum(seq <= 100 for seq in chosen[0]) < 40
    fewer = snapshot_of(vectors[4:], seqs[4:], 204)
    assert len(set(chosen[0]) & set(fewer.seqs(sampled(fewer, 50)).tolist())) >= 46
    assert len(sampled(fewer, 1000)) == 196


def test_maps__of_pca_are_kept(tmp_path: Path, random_units: Units) -> None:
    maps = maps_of(tmp_path)
    snapshot = snapshot_of(random_units(20, 4), np.arange(1, 21), 20)
    first = maps.ask(snapshot, "pca", 9)
    assert isinstance(first, Map)
    assert (len(first.ids), first.items) == (9, 20)
    assert maps.ask(snapshot, "pca", 9) is first
    for sample in range(1, KEPT + 1):
        maps.ask(snapshot, "pca", sample if sample < 9 else 10)
    assert maps.look(Key(20, "pca", 9)) is None  # the oldest went


def test_umap__comes_from_a_child(
    tmp_path: Path, random_units: Units, started: Callable[[Maps], Maps]
) -> None:
    maps = started(maps_of(tmp_path))
    vectors = random_units(20, 4)
    snapshot = snapshot_of(vectors, np.arange(1, 21), 20)
    key = maps.ask(snapshot, "umap", 1000)
    assert key == Key(20, "umap", 20)
    assert maps.ask(snapshot, "umap", 20) in (key, maps.look(Key(20, "umap", 20)))
    found = awaited(maps, key)
    assert isinstance(found, Map)
    np.testing.assert_array_equal(found.coordinates, vectors[:, :2])
    assert maps.ask(snapshot, "umap", 1000) is found


@pytest.mark.parametrize(
    ("before", "after", "reason", "setting"),
    [
        ("sys.exit('no such luck')", "", "no such luck", None),
        ("raise MemoryError", "", "memory", "map_memory_bytes"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "", "code -9", None),
        ("", "[:3]", "20 points", None),
        ("", "* np.nan", "20 points", None),
        ("import time; time.sleep(60)", "", "not done within", "map_timeout_s"),
    ],
)
def test_umap__that_fails_says_why_once(
    tmp_path: Path,
    random_units: Units,
    started: Callable[[Maps], Maps],
    before: str,
    after: str,
    reason: str,
    setting: str | None,
) -> None:
    slow = "sleep" in before
    maps = started(maps_of(tmp_path, before, after, timeout_s=0.2 if slow else 20))
    key = maps.ask(snapshot_of(random_units(20, 4), np.arange(1, 21), 20), "umap", 20)
    failure = awaited(maps, key)
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert failure.setting == setting
    assert isinstance(key, Key)
    assert maps.look(key) is None  # the next question tries again


def test_umaps__beyond_those_that_may_wait_are_refused_and_all_end_with_the_service(
    tmp_path: Path, random_units: Units, started: Callable[[Maps], Maps]
) -> None:
    maps = started(maps_of(tmp_path, "import time; time.sleep(600)"))
    snapshot = snapshot_of(random_units(20, 4), np.arange(1, 21), 20)
    for sample in (10, 11):
        maps.ask(snapshot, "umap", sample)
    with pytest.raises(QueueFull) as refused:
        maps.ask(snapshot, "umap", 12)
    assert refused.value.limit == 2
    maps.close()  # comes back, though a child would sleep on


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
@pytest.mark.long
@pytest.mark.parametrize("count", [5, 40])
def test_umap__really(random_units: Units, count: int) -> None:
    found = embedded(random_units(count, 6))
    assert found.shape == (count, 2)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, embedded(random_units(count, 6)))
