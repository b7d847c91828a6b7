"""service.groups: the group of an anchor is what training's propagation reaches, built lazily."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import records_of
from service.groups import Order, propagated_groups, walk_width
from trainer.representation.neighbours import exact_graph, exact_neighbours
from trainer.representation.propagation import hardest_positives, propagate

Units = Callable[..., NDArray[np.float32]]


def snapshot_of(vectors: NDArray[np.float32]) -> FaissSnapshot:
    count = len(vectors)
    ids = [str(n) for n in range(count)]
    records = records_of(
        vectors=vectors, ids=ids, metadata=[b"{}"] * count, seqs=np.arange(count) + 1
    )
    return FaissSnapshot.of(records, count)


@pytest.mark.parametrize(("k", "steps"), [(1, 1), (1, 6), (4, 3), (3, 4), (7, 1)])
def test_groups__equal_propagation_on_the_graph_of_all_items(
    random_units: Units, k: int, steps: int
) -> None:
    vectors = random_units(120, 6)
    anchors = np.asarray([0, 5, 5, 119, 60])  # one of them twice
    groups = propagated_groups(
        snapshot_of(vectors),
        vectors=vectors[anchors],
        rows=anchors,
        k=k,
        steps=steps,
        order="step",
        limit=10_000,
    )
    expected = propagate(exact_graph(vectors, k), anchors, steps)
    for anchor, group, ids in zip(anchors, groups, expected, strict=True):
        reached = ids[ids >= 0]
        assert [member.row for member in group.members] == reached.tolist()
        assert (group.reached, group.truncated) == (len(reached), False)
        np.testing.assert_allclose(
            [member.similarity for member in group.members],
            vectors[reached] @ vectors[anchor],
            atol=1e-6,
        )


def test_groups__of_a_stranger_start_at_its_nearest_items(random_units: Units) -> None:
    vectors, (stranger,) = random_units(80, 6), random_units(1, 6, 9)
    # The same by hand: the stranger as one more node, with edges out and none in.
    graph = exact_graph(vectors, 3)
    out = exact_neighbours(stranger[None], vectors, 3)
    extended = graph._replace(neighbours=np.concatenate([graph.neighbours, out.ids]))
    expected = propagate(extended, np.asarray([80]), 3)[0]
    (group,) = propagated_groups(
        snapshot_of(vectors),
        vectors=stranger[None],
        rows=np.asarray([-1]),
        k=3,
        steps=3,
        order="step",
        limit=1000,
    )
    assert [m.row for m in group.members] == expected[expected >= 0].tolist()
    assert [m.via for m in group.members[:3]] == [None, None, None]
    assert all(m.via is not None for m in group.members[3:])


def test_groups__on_a_line_by_hand() -> None:
    degrees = np.deg2rad([0, 10, 19, 27, 34])  # each is nearest to the next
    vectors = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    (group,) = propagated_groups(
        snapshot_of(vectors),
        vectors=vectors[:1],
        rows=np.asarray([0]),
        k=1,
        steps=3,
        order="hardest",
        limit=2,
    )
    assert [(m.row, m.step, m.via) for m in group.members] == [(3, 3, 2), (2, 2, 1)]
    assert (group.reached, group.truncated) == (3, True)


@pytest.mark.parametrize("order", ["nearest", "hardest"])
def test_groups__are_ordered_by_similarity(random_units: Units, order: Order) -> None:
    vectors = random_units(60, 6)
    (group,) = propagated_groups(
        snapshot_of(vectors),
        vectors=vectors[:1],
        rows=np.asarray([0]),
        k=4,
        steps=2,
        order=order,
        limit=1000,
    )
    similarities = [m.similarity for m in group.members]
    assert similarities == sorted(similarities, reverse=order == "nearest")
    if order == "hardest":
        reached = propagate(exact_graph(vectors, 4), np.asarray([0]), 2)
        cosines = np.where(reached >= 0, vectors[reached] @ vectors[0], 0)
        hardest = hardest_positives(reached, cosines, 5)[0]
        assert [m.row for m in group.members[:5]] == hardest.tolist()


def test_groups__of_the_only_item_are_empty(random_units: Units) -> None:
    vectors = random_units(1, 6)
    (group,) = propagated_groups(
        snapshot_of(vectors),
        vectors=vectors,
        rows=np.asarray([0]),
        k=4,
        steps=3,
        order="nearest",
        limit=10,
    )
    assert (group.members, group.reached, group.truncated) == ([], 0, False)


def test_groups__stop_at_the_deadline(random_units: Units) -> None:
    vectors = random_units(5, 6)
    with pytest.raises(TimeoutError):
        propagated_groups(
            snapshot_of(vectors),
            vectors=vectors,
            rows=np.arange(5),
            k=2,
            steps=2,
            order="step",
            limit=9,
            deadline=0.0,
        )


def test_walk_width__is_the_sum_of_powers() -> None:
    assert (walk_width(4, 3), walk_width(1, 5), walk_width(50, 1)) == (84, 5, 50)
