"""Galleries in memory for the tests of the search, and the plain answer they are compared with."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Records, records_of
from service.gallery.segment import Segment


def make_records(vectors: NDArray[np.float32], first: int = 0) -> Records:
    """Items i0, i1, ... with metadata n and even, written by operations 1, 2, ..."""
    numbers = range(first, first + len(vectors))
    return records_of(
        vectors=vectors,
        ids=[f"i{n}" for n in numbers],
        metadata=[orjson.dumps({"n": n, "even": n % 2 == 0}) for n in numbers],
        seqs=np.asarray(numbers) + 1,
    )


def make_snapshot(
    vectors: NDArray[np.float32],
    *,
    cuts: Sequence[int] = (),
    dead: Sequence[int] = (),
    first: Callable[[Records], Segment] = Segment.of,
) -> FaissSnapshot:
    """Cut into segments before each of the rows `cuts`; `first` makes the first of them."""
    gone = np.zeros(len(vectors), bool)
    gone[list(dead)] = True
    bounds = sorted({0, *cuts, len(vectors)})
    parts = [make_records(vectors[a:b], a) for a, b in itertools.pairwise(bounds)]
    segments = [Segment.of(part) if n else first(part) for n, part in enumerate(parts)]
    return FaissSnapshot(
        len(vectors), vectors.shape[1], None, tuple(segments), gone, num_dead=len(dead)
    )


def plain_search(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_],
    exclude: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Every cosine in float64, sorted; equal ones by row."""
    rows = np.full((len(queries), k), -1)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for place, query in enumerate(queries):
        cosines = (vectors.astype(np.float64) * query).sum(axis=1).clip(-1, 1).astype(np.float32)
        usable = allowed.copy()
        if exclude is not None and exclude[place] >= 0:
            usable[exclude[place]] = False
        best = [r for r in np.lexsort((np.arange(len(vectors)), -cosines)) if usable[r]][:k]
        rows[place, : len(best)] = best
        similarities[place, : len(best)] = cosines[best]
    return rows, similarities


def clustered_rows(count: int, dim: int = 16, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around a few directions, as embeddings lie."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((12, dim))
    rows = centres[generator.integers(12, size=count)] + 0.7 * generator.standard_normal(
        (count, dim)
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def records() -> Callable[..., Records]:
    return make_records


@pytest.fixture(scope="session")
def snapshot() -> Callable[..., FaissSnapshot]:
    return make_snapshot


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., Any]:
    return plain_search


@pytest.fixture(scope="session")
def clustered() -> Callable[..., NDArray[np.float32]]:
    return clustered_rows
