"""Measure the search indexes on a gallery: python -m service.tune --state DIR [--recall 0.95]

The service must be stopped, or DIR a copy. Some items are left out of the indexes and asked for:
recall@10 against looking at all, and searches per second on one thread. Prints a table and writes
DIR/tuning.json, which the service uses from its next start on: of the kinds that the gallery's size
and memory allow, the fastest that reaches the recall.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import faiss
import numpy as np

from service.gallery.approximate import default_effort
from service.gallery.changes import replay
from service.gallery.choice import EXACT_ITEMS, Choice, Kind, effort_of, memory_bytes
from service.gallery.database import Database
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import GalleryError, StorageError, Vectors
from service.gallery.records import Records
from service.gallery.rows import active_of, galleries_of
from service.gallery.segment import Segment
from service.gallery.tuning import write_tuning
from service.machine import usable_memory_bytes

QUERIES = 1000  # at most; a tenth of the items where they are fewer
FEWEST_ITEMS = 100  # below, nothing is worth measuring
K, BATCH = 10, 64
SECONDS = 1.0  # of searching for one figure, about
SEED = 0


MEASURED: tuple[Kind, ...] = ("flat", "flat-fp16", "hnsw", "ivf")


class Figures(NamedTuple):
    """One row of the report."""

    kind: str
    effort: int
    recall: float  # @10
    single_qps: float  # one query a call, one thread
    batch_qps: float  # 64 queries a call, one thread
    memory_bytes: int
    build_s: float


class TuneError(Exception):
    """Nothing can be measured; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.tune", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="the state directory")
    parser.add_argument("--database", help="a postgresql:// URL, where the log is there")
    parser.add_argument("--recall", type=float, default=0.95, help="the least recall@10, 0..1")
    parser.add_argument("--exact-items", type=int, default=EXACT_ITEMS, help="as of the service")
    parser.add_argument(
        "--search-memory-bytes", type=int, default=0, help="as of the service; 0 = half of all"
    )
    options = parser.parse_args(arguments)
    try:
        return _tune(options)
    except (TuneError, GalleryError, StorageError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _tune(options: argparse.Namespace) -> int:
    if not 0 <= options.recall <= 1:
        raise TuneError(f"--recall is {options.recall}, wanted 0..1")
    if not options.state.is_dir():
        raise TuneError(f"{options.state} is no directory; give the service's --state")
    allowed = options.search_memory_bytes or usable_memory_bytes() // 2
    database = Database(options.state, options.database)
    try:
        with database.reading() as connection:
            gallery = active_of(galleries_of(connection))
        if gallery is None:
            raise TuneError(f"{database.name} holds no gallery yet; start the service once")
        log = OperationsLog(database, gallery)
        log.check_end()
        records = replay(log.replay(), gallery.dim)
        figures = list(measure(records, options.state, print_row=_say))
        choice = best_of(
            figures,
            recall=options.recall,
            exact=len(records) <= options.exact_items,
            allowed_bytes=allowed,
        )
        path = write_tuning(
            options.state,
            gallery,
            items=len(records),
            choice=choice,
            figures=[row._asdict() for row in figures],
        )
    finally:
        database.close()
    _say(f"chosen for {len(records)} items: {choice.kind} {choice.effort or ''}".rstrip())
    _say(f"written: {path}; the service uses it from its next start on")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measure(
    records: Records, directory: Path, *, print_row: Callable[[str], None]
) -> Iterator[Figures]:
    """Build each index without some items and ask for those; yields a row for each effort.

    Raises:
        TuneError: there are too few items.
    """
    count = len(records)
    if count < FEWEST_ITEMS:
        raise TuneError(f"the gallery has {count} items; from {FEWEST_ITEMS} on it can be measured")
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(SEED)
    asked = np.sort(generator.choice(count, min(QUERIES, count // 10), replace=False))
    queries = records.vectors[asked]
    rest = records.take(np.setdiff1d(np.arange(count), asked))
    truth = FaissSnapshot.of(rest, 0).search(queries, K).rows
    print_row(f"{count} items, {len(asked)} of them asked for (seed {SEED}), k = {K}, 1 thread")
    print_row("kind       effort  recall@10  queries/s single  in batches  memory MB  built s")
    with tempfile.TemporaryDirectory(dir=directory) as spilled:
        for kind in MEASURED:
            began = time.perf_counter()
            choice = Choice(kind, effort_of(kind, count))
            segment = Segment.indexed(rest, choice, directory=Path(spilled))
            build_s = time.perf_counter() - began
            for effort in _efforts(choice, count):
                row = _figures(segment, effort, queries, truth, build_s, count)
                print_row(
                    f"{row.kind:10s} {row.effort:6d} {row.recall:10.4f} {row.single_qps:17.0f} "
                    f"{row.batch_qps:11.0f} {row.memory_bytes / 1e6:10.1f} {row.build_s:8.1f}"
                )
                yield row


def best_of(
    figures: Sequence[Figures], *, recall: float, exact: bool, allowed_bytes: int
) -> Choice:
    """The fastest in batches that reaches the recall and fits; else the one of most recall."""
    kinds = ("flat", "flat-fp16") if exact else ("hnsw", "ivf")
    fitting = [f for f in figures if f.kind in kinds and f.memory_bytes <= allowed_bytes]
    if not fitting:
        raise TuneError(
            f"none of {', '.join(kinds)} fits into {allowed_bytes} bytes; give the service more "
            "search_memory_bytes"
        )
    good = [f for f in fitting if f.recall >= recall]
    chosen = max(good, key=lambda f: f.batch_qps) if good else max(fitting, key=lambda f: f.recall)
    return Choice(cast(Kind, chosen.kind), chosen.effort)


def _efforts(choice: Choice, items: int) -> list[int]:
    if choice.is_exact:
        return [0]
    if choice.kind == "hnsw":
        return [16, 32, 64, 128, 256]
    middle = default_effort(choice.kind, items)
    return sorted({max(1, middle // 4), max(1, middle // 2), middle, 2 * middle, 4 * middle})


def _figures(
    segment: Segment, effort: int, queries: Vectors, truth: Any, build_s: float, items: int
) -> Figures:
    dim = queries.shape[1]
    dead = np.zeros(len(segment), bool)
    snapshot = FaissSnapshot(0, dim, None, (segment.with_effort(effort),), dead, 0)
    found = snapshot.search(queries, K, exact=False).rows
    hits = [len(np.intersect1d(a, b)) for a, b in zip(truth, found, strict=True)]
    qps = {}
    for batch in (1, BATCH):
        seconds: list[float] = []
        ends_at = time.perf_counter() + SECONDS
        start = 0
        while not seconds or time.perf_counter() < ends_at:
            some = queries[start : start + batch]
            began = time.perf_counter()
            snapshot.search(some, K, exact=False)
            seconds.append((time.perf_counter() - began) / len(some))
            start = (start + batch) % len(queries)
        qps[batch] = 1 / median(seconds)
    return Figures(
        segment.kind,
        effort,
        float(np.sum(hits)) / truth.size,
        qps[1],
        qps[BATCH],
        memory_bytes(segment.kind, items, dim),
        build_s,
    )


if __name__ == "__main__":
    sys.exit(main())
