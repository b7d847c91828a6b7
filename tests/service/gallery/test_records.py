"""service.gallery.records: columns that are taken apart and joined hold what was put in."""

import numpy as np

from service.gallery.records import Blobs, join, records_of

METADATA = [b"{}", b'{"a":1}', b'{"name":"\xc3\xa9"}', b"{}"]


def test_blobs__give_back_what_they_were_made_of() -> None:
    blobs = Blobs.of(METADATA)
    assert [blobs[row] for row in range(len(blobs))] == METADATA
    taken = blobs.take(np.asarray([3, 1, 1]))
    assert [taken[row] for row in range(len(taken))] == [b"{}", b'{"a":1}', b'{"a":1}']
    assert len(blobs.take(np.asarray([], np.int64))) == 0
    assert len(Blobs.of([])) == 0


def test_join__of_parts_is_the_whole() -> None:
    whole = records_of(
        vectors=np.arange(8, dtype=np.float32).reshape(4, 2),
        ids=["a", "b", "c", "d"],
        metadata=METADATA,
        seqs=[2, 3, 5, 8],
    )
    joined = join([whole.take(np.asarray(rows, np.int64)) for rows in ([0], [], [1, 2, 3])])
    np.testing.assert_array_equal(joined.vectors, whole.vectors)
    assert joined.ids.tolist() == ["a", "b", "c", "d"]
    assert joined.seqs.tolist() == [2, 3, 5, 8]
    assert [joined.parsed(row) for row in range(4)] == [{}, {"a": 1}, {"name": "é"}, {}]
