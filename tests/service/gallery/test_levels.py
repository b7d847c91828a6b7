"""service.gallery.levels: whatever was written and killed, the live rows are those of a dict."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery import levels
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Records, records_of
from service.gallery.segment import Segment

Units = Callable[..., NDArray[np.float32]]


def written(ids: list[str], first_seq: int, vectors: NDArray[np.float32]) -> Records:
    seqs = np.arange(first_seq, first_seq + len(ids))
    return records_of(vectors=vectors, ids=ids, metadata=[b"{}"] * len(ids), seqs=seqs)


@pytest.mark.parametrize("seed", range(6))
def test_advance__agrees_with_a_dict(
    random_units: Units, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(levels, "SMALL_ROWS", 4)
    monkeypatch.setattr(levels, "MAX_DEAD", 3)
    generator = np.random.default_rng(seed)
    snapshot = FaissSnapshot.of(written([], 1, np.empty((0, 3), np.float32)), 0)
    model: dict[str, tuple[int, NDArray[np.float32]]] = {}
    seq = 0
    for step in range(40):
        ids = [f"i{n}" for n in generator.choice(60, generator.integers(0, 9), replace=False)]
        deleted = [i for i in list(model) if i not in ids and generator.random() < 0.08]
        vectors = random_units(len(ids), 3, 1000 * seed + step)
        gone = [snapshot.row(i) for i in (*ids, *deleted) if i in model]
        snapshot = levels.advance(
            snapshot,
            gone=np.asarray(gone, np.int64),
            fresh=written(ids, seq + 1, vectors),
            version=step,
        )
        for item_id in deleted:
            del model[item_id]
        for number, item_id in enumerate(ids):
            model.pop(item_id, None)
            model[item_id] = (seq + 1 + number, vectors[number])
        seq += len(ids)

        rows = snapshot.rows()
        assert len(snapshot) == len(model)
        assert snapshot.ids(rows).tolist() == list(model)
        assert snapshot.seqs(rows).tolist() == [s for s, _ in model.values()]
        expected = np.asarray([v for _, v in model.values()]).reshape(-1, 3)
        np.testing.assert_array_equal(snapshot.vectors(rows), expected)
        assert [snapshot.row(f"i{n}") is not None for n in range(60)] == [
            f"i{n}" in model for n in range(60)
        ]
        sizes = [len(s) for s in snapshot.segments]
        assert all(a >= b for a, b in itertools.pairwise(sizes))


def test_advance__copies_a_row_seldom(random_units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "SMALL_ROWS", 8)
    vectors = random_units(1024, 3)
    snapshot = FaissSnapshot.of(written([], 1, vectors[:0]), 0)
    copied = 0
    for first in range(0, 1024, 8):
        ids = [f"i{n}" for n in range(first, first + 8)]
        before = set(map(id, snapshot.segments))
        fresh = written(ids, first + 1, vectors[first : first + 8])
        snapshot = levels.advance(snapshot, gone=np.empty(0, np.int64), fresh=fresh, version=first)
        copied += sum(len(s) for s in snapshot.segments if id(s) not in before)
        assert len(snapshot.segments) <= 8  # log2(1024 / 8) + 1
    assert copied <= 1024 * 8


def test_adopt__joins_what_was_built_with_what_happened_meanwhile(random_units: Units) -> None:
    vectors = random_units(12, 3)
    ids = [f"i{n}" for n in range(10)]
    old = FaissSnapshot.of(written(ids, 1, vectors[:10]), 10)
    nothing = np.empty(0, np.int64)
    old = levels.advance(old, gone=np.asarray([4]), fresh=written([], 11, vectors[:0]), version=11)
    built = Segment.of(old.take(old.rows()))
    fresh = written(["i7", "new"], 12, vectors[10:])
    current = levels.advance(old, gone=np.asarray([2, 7]), fresh=fresh, version=14)
    adopted = levels.adopt(current, built, old.version)
    assert adopted.segments[0] is built
    assert (len(adopted), adopted.num_dead, adopted.version) == (9, 2, 14)
    rows, expected = adopted.rows(), current.rows()
    assert adopted.ids(rows).tolist() == current.ids(expected).tolist()
    assert adopted.seqs(rows).tolist() == current.seqs(expected).tolist()
    np.testing.assert_array_equal(adopted.vectors(rows), current.vectors(expected))
    assert [adopted.row("i2"), adopted.row("i4")] == [None, None]
    emptied = levels.advance(current, gone=expected, fresh=written([], 15, vectors[:0]), version=20)
    assert len(levels.adopt(emptied, built, old.version)) == 0
    assert len(levels.adopt(emptied, Segment.of(emptied.take(nothing)), 20)) == 0
