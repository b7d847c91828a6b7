"""service.partition: equal to the definition followed word by word, however rows are numbered."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.faiss_index import FaissSnapshot
from service.graph import built_graph
from service.partition import Partition, mutual_pairs, partition
from tests.service.test_graph import snapshot_of

Units = Callable[..., NDArray[np.float32]]


def silent(*_: object) -> None:
    """No progress is wanted."""


def parted(snapshot: FaissSnapshot, k: int, steps: int, min_size: int) -> Partition:
    graph = built_graph(snapshot, k, progress=silent)
    wanted = graph.neighbours
    places = np.where(wanted >= 0, np.searchsorted(graph.seqs, wanted), -1)
    return partition(
        snapshot, snapshot.rows(), places, steps=steps, min_size=min_size, report=silent
    )


def groups_of(found: Partition) -> list[list[int]]:
    return [
        found.members[a:b].tolist()
        for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)
    ]


def by_the_definition(
    vectors: NDArray[np.float32], k: int, steps: int, min_size: int
) -> list[list[int]]:
    """The docstring of service.partition, slowly: sets and loops."""
    exact = vectors.astype(np.float64)
    cosines = (exact @ exact.T).clip(-1, 1).astype(np.float32)
    count = len(vectors)

    def closest(i: int) -> list[int]:
        return sorted((j for j in range(count) if j != i), key=lambda j: (-cosines[i, j], j))[:k]

    reach: list[set[int]] = []
    for i in range(count):
        reached, frontier = {i}, {i}
        for _ in range(steps):
            frontier = {j for f in frontier for j in closest(f)} - reached
            reached |= frontier
        reach.append(reached - {i})
    partners = [{j for j in reach[i] if i in reach[j]} for i in range(count)]
    greatness = [(len(partners[i]), -i) for i in range(count)]
    groups: dict[int, list[int]] = {}
    for i in range(count):
        at = i
        while above := [j for j in partners[at] if greatness[j] > greatness[at]]:
            here = at
            at = min(above, key=lambda j: (-cosines[here, j], j))
        groups.setdefault(at, []).append(i)
    for peak, members in groups.items():
        members.sort(key=lambda m: (m != peak, -cosines[m, peak], m))
    kept = [(-len(m), peak, m) for peak, m in groups.items() if len(m) >= min_size]
    return [members for _, _, members in sorted(kept)]


@pytest.mark.parametrize("seed", range(6))
def test_partition__follows_the_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count, grid = int(draw.integers(1, 90)), int(draw.integers(1, 30))
    k, steps = int(draw.integers(1, 6)), int(draw.integers(1, 4))
    min_size = int(draw.integers(1, 5))
    # Few different vectors: equal similarities and equal supports are met again and again.
    raw = draw.integers(-grid, grid + 1, (count, 3)) + np.asarray([0, 0, 0.5])
    vectors = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    expected = by_the_definition(vectors, k, steps, min_size)
    seqs = np.cumsum(draw.integers(1, 5, count))
    for main in (count, 0, count // 2):  # rows are numbered otherwise
        found = parted(snapshot_of(vectors, seqs, 7, main=main), k, steps, min_size)
        assert groups_of(found) == expected
        assert np.diff(found.starts).sum() == len(found.members) == len(set(found.members.tolist()))


def test_partition__of_two_bundles_joined_by_a_bridge() -> None:
    # Two bundles of directions 60 degrees apart, a thin bridge of items between them.
    degrees = np.deg2rad([*np.arange(0, 10), *np.arange(15, 60, 5), *np.arange(60, 70)])
    vectors = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    found = parted(snapshot_of(vectors, np.arange(1, 30), 29), 4, 3, 5)
    left, right = set(range(10)), set(range(19, 29))
    groups = [set(group) for group in groups_of(found)]
    assert not any(group & left and group & right for group in groups)


def test_partition__dissolves_small_groups_and_says_how_large_they_were(
    random_units: Units,
) -> None:
    snapshot = snapshot_of(random_units(40, 6), np.arange(1, 41), 40)
    whole, none = parted(snapshot, 3, 2, 1), parted(snapshot, 3, 2, 1000)
    assert whole.starts[-1] == 40
    assert (len(none.members), none.starts.tolist()) == (0, [0])
    assert none.largest_dissolved == np.diff(whole.starts).max()
    assert whole.largest_dissolved == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_partition__of_next_to_nothing(random_units: Units, count: int) -> None:
    found = parted(snapshot_of(random_units(count, 6), np.arange(1, count + 1), count), 4, 3, 1)
    assert len(found.members) == count
    assert groups_of(found) == [[], [[0]], [[0, 1]]][count]


def test_pairs__reach_each_other_however_the_work_is_cut(
    random_units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = built_graph(snapshot_of(random_units(70, 4), np.arange(1, 71), 70), 3, progress=silent)
    places = np.searchsorted(graph.seqs, graph.neighbours)
    plain = sorted(zip(*(p.tolist() for p in mutual_pairs(places, 2, silent)), strict=True))
    assert plain
    monkeypatch.setattr("service.partition._WALKS_TOGETHER", 25)
    cut = sorted(zip(*(p.tolist() for p in mutual_pairs(places, 2, silent)), strict=True))
    assert cut == plain


def test_report__tells_each_stage(random_units: Units) -> None:
    stages: list[str] = []
    snapshot = snapshot_of(random_units(20, 4), np.arange(1, 21), 20)
    graph = built_graph(snapshot, 3, progress=silent)
    partition(
        snapshot,
        snapshot.rows(),
        np.searchsorted(graph.seqs, graph.neighbours),
        steps=2,
        min_size=1,
        report=lambda stage, done, total: stages.append(stage),
    )
    assert list(dict.fromkeys(stages)) == ["propagating", "matching", "guiding", "members"]
