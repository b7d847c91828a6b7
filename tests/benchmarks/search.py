"""Searching a gallery in process, beside faiss itself: exact in batches, and through HNSW.

    OMP_NUM_THREADS=1 python tests/benchmarks/search.py exact [--items 50000] [--rounds 7]
    OMP_NUM_THREADS=1 python tests/benchmarks/search.py hnsw [--items 50000]

exact: FaissSnapshot.search beside IndexFlatIP with faiss' default threshold, with matrix
multiplication forced, and with the sequential scan forced. hnsw: the same graph searched by faiss
and through the snapshot, with recall@10. Vectors are unit, 128 dimensions, clustered (seeded);
rounds are interleaved, figures are medians of CPU time. Asserts nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import faiss
import numpy as np
from numpy.typing import NDArray

from service.gallery.choice import Choice
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Records, records_of
from service.gallery.segment import Segment

DIM, K = 128, 10
OURS = faiss.cvar.distance_compute_blas_threshold
DEFAULT = 128_000  # faiss 1.15


def clustered(count: int, *, seed: int = 0, centres: int = 1000) -> NDArray[np.float32]:
    """Unit rows around random directions, at a cosine of about 0.7 to them."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((centres, DIM), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = np.empty((count, DIM), np.float32)
    for start in range(0, count, 100_000):
        part = rows[start : start + 100_000]
        part[:] = generator.standard_normal(part.shape, np.float32) / np.float32(DIM**0.5)
        part += directions[generator.integers(0, centres, len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def records(vectors: NDArray[np.float32]) -> Records:
    """As items without metadata."""
    count = len(vectors)
    ids = [f"images/{n:09d}.jpg" for n in range(count)]
    return records_of(
        vectors=vectors, ids=ids, metadata=[b"{}"] * count, seqs=np.arange(1, count + 1)
    )


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.thread_time()  # one thread does it all: what others do counts less
            call()
            seconds[name].append(time.thread_time() - began)
    return {name: median(values) for name, values in seconds.items()}


def exact(items: int, rounds: int) -> None:
    """C11."""
    vectors = clustered(items)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    # Both look at the same memory: what lies in the processor's cache is the same for both.
    shared = faiss.rev_swig_ptr(flat.get_xb(), items * DIM).reshape(items, DIM)
    snapshot = FaissSnapshot.of(records(shared), items)

    def under(threshold: int, search: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return search()

        return call

    print(f"N = {items}: ms a batch | ours / default, ours / best of both")
    for batch in (1, 8, 16, 64, 256):
        queries = clustered(batch, seed=5)
        calls = {
            "default": under(DEFAULT, lambda q=queries: flat.search(q, K)),
            "sequential": under(2**30, lambda q=queries: flat.search(q, K)),
            "blas": under(1, lambda q=queries: flat.search(q, K)),
            "ours": under(OURS, lambda q=queries: snapshot.search(q, K)),
        }
        times = interleaved(calls, rounds if batch > 1 else 5 * rounds)
        best = min(times["sequential"], times["blas"])
        figures = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in times.items())
        print(
            f"batch {batch}: {figures} | {times['default'] / times['ours']:.2f}, "
            f"{best / times['ours']:.3f}",
            flush=True,
        )


def hnsw(items: int, rounds: int) -> None:
    """C12 in process."""
    vectors, queries = clustered(items), clustered(512, seed=5)
    _, truth = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        choice = Choice("hnsw", 64)
        segment = Segment.indexed(records(vectors), choice, directory=Path(directory))
    print(f"N = {items}: built in {time.perf_counter() - began:.1f} s")
    raw = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    raw.hnsw.efConstruction = 80
    raw.add(vectors)
    for effort in (16, 32, 64, 128):
        raw.hnsw.efSearch = effort
        dead = np.zeros(items, bool)
        snapshot = FaissSnapshot(items, DIM, None, (segment.with_effort(effort),), dead, 0)
        for batch in (64, 512):
            some = queries[:batch]
            times = interleaved(
                {
                    "faiss": lambda q=some: raw.search(q, K),
                    "ours": lambda q=some, s=snapshot: s.search(q, K, exact=False),
                },
                3 * rounds,
            )
            _, theirs = raw.search(queries, K)
            mine = snapshot.search(queries, K, exact=False).rows
            recalls = [
                np.mean([len(set(a) & set(b)) / K for a, b in zip(truth, rows, strict=True)])
                for rows in (theirs, mine)
            ]
            print(
                f"ef {effort}, batch {batch}: faiss {batch / times['faiss']:.0f} qps, ours "
                f"{batch / times['ours']:.0f} = {times['faiss'] / times['ours']:.3f}; recall@10 "
                f"{recalls[0]:.4f}, {recalls[1]:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["exact", "hnsw"])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    {"exact": exact, "hnsw": hnsw}[options.what](options.items, options.rounds)
