"""service.gallery.approximate: what is found, only what is allowed, and the same after a reload."""

from collections.abc import Callable

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery import approximate

Rows = Callable[..., NDArray[np.float32]]
EFFORT = {"hnsw": 48, "ivf": 8}


@pytest.fixture(scope="module")
def vectors(clustered: Rows) -> NDArray[np.float32]:
    return clustered(900)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_index__finds_the_same_after_it_was_read(
    vectors: NDArray[np.float32], clustered: Rows, kind: str
) -> None:
    queries = clustered(30, seed=3)
    built = approximate.build(kind, vectors)
    content = built.to_bytes()
    assert content is not None
    read = approximate.load(kind, content.copy(), vectors)
    assert read.num_bytes == built.num_bytes
    _, expected = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)
    for index in (built, read):
        scores, rows = index.search(queries, 10, effort=EFFORT[kind], allowed=None)
        hits = [len(set(a) & set(b)) for a, b in zip(expected, rows, strict=True)]
        assert sum(hits) >= 0.95 * 300
        np.testing.assert_allclose(
            scores, np.einsum("bkd,bd->bk", vectors[rows], queries), atol=1e-3
        )


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_index__gives_allowed_rows_only(vectors: NDArray[np.float32], kind: str) -> None:
    allowed = np.zeros(900, bool)
    allowed[100:120] = True
    bits = np.packbits(allowed, bitorder="little")
    _, rows = approximate.build(kind, vectors).search(
        vectors[:9], 40, effort=EFFORT[kind], allowed=bits
    )
    assert allowed[rows[rows >= 0]].all()
    assert (rows[:, 20:] == -1).all()


def test_hnsw__looks_at_the_vectors_that_it_was_given(vectors: NDArray[np.float32]) -> None:
    own = vectors.copy()
    index = approximate.build("hnsw", own)
    before, _ = index.search(own[:1], 1, effort=32, allowed=None)
    own *= np.float32(0.5)  # never done to a gallery: shows that there is no copy
    after, _ = index.search(own[:1], 1, effort=32, allowed=None)
    assert after[0, 0] == pytest.approx(before[0, 0] / 4)


def test_load__refuses_an_index_of_other_rows(vectors: NDArray[np.float32]) -> None:
    content = approximate.build("hnsw", vectors).to_bytes()
    assert content is not None
    with pytest.raises(ValueError, match="holds 900 rows of 16"):
        approximate.load("hnsw", content, vectors[:899])


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_build__is_called_off(vectors: NDArray[np.float32], kind: str) -> None:
    with pytest.raises(approximate.Stopped):
        approximate.build(kind, vectors, stopping=lambda: True)
