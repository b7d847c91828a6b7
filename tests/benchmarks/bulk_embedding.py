"""Bulk embedding against bare decoding and onnxruntime, and loading a million vectors.

    python tests/benchmarks/bulk_embedding.py embed load [--images 320] [--rounds 5] [--vectors N]

embed: a folder of JPEGs through BulkEmbedder and into parts, against `prepare` and a bare session
on the same files and cores, in turns: processor seconds of an image (all processes), and images a
second of wall time, the bare work in one process a core (goal >= 0.95 of it). load: vectors drawn
at random, as embed writes them, into an empty state by `python -m service.load` (goal: a million in
5 minutes), once more (nothing to do), and a start of the gallery on what was loaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.bulk.embedding import BulkEmbedder
from service.bulk.parts import Output, Plan
from service.bulk.sources import open_source
from service.embedder import OnnxEmbedder
from service.gallery.logged import LoggedGallery
from service.machine import usable_cores
from service.settings import Settings
from tests.benchmarks.served_models import jpeg, photo, random_bundle, session
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import prepare

BATCH = 32
DIFFERENT = 32  # pictures; the others are copies of them
say = sys.stdout.write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=("embed", "load"))
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder), options.size, variants=())
        if "embed" in options.parts:
            embed(Path(folder), bundle, options)
        if "load" in options.parts:
            load(Path(folder), bundle, options.vectors)


def embed(folder: Path, bundle: Path, options: argparse.Namespace) -> None:
    photos = folder / "photos"
    photos.mkdir()
    files = [jpeg(photo(n, 500, 375)) for n in range(DIFFERENT)]
    for n in range(options.images):
        (photos / f"{n:05d}.jpg").write_bytes(files[n % DIFFERENT])
    source = open_source(str(photos))
    settings = Settings(bundle=bundle, state=folder)
    embedder = OnnxEmbedder(open_bundle(bundle), execution_provider="cpu")
    plan = Plan(
        embedder.model_id, "embedding", 128, "fp32", "folder", len(source), len(source), ("x",)
    )
    shares = [
        sorted(map(str, photos.iterdir()))[n :: usable_cores()] for n in range(usable_cores())
    ]
    with (
        BulkEmbedder(embedder, "embedding", settings) as bulk,
        ProcessPoolExecutor(len(shares), get_context("spawn"), _open, (str(bundle),)) as bare,
        tempfile.TemporaryDirectory() as outputs,
    ):
        turn = iter(range(10_000))

        def ours() -> None:
            with Output(Path(outputs) / str(next(turn)), plan) as output:
                found = bulk.embed(source, 0, len(source), lambda count: None)
                output.write(0, found.ids, found.vectors, found.rejected)
                output.finish()

        def theirs() -> None:
            list(bare.map(_bare, shares))

        figures: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        for round_ in range(options.rounds + 1):
            for name, call in (("ours", ours), ("bare", theirs)):
                taken = _timed(call)
                if round_:  # the first warms up
                    figures[name].append(taken)
    wall = {name: statistics.median(t[0] for t in taken) for name, taken in figures.items()}
    cpu = {name: statistics.median(t[1] for t in taken) for name, taken in figures.items()}
    count = options.images
    for name in figures:
        say(
            f"embed {options.size} px {name}: {count / wall[name]:.1f} images/s, "
            f"{1e3 * cpu[name] / count:.2f} ms of processor an image\n"
        )
    walls = [b[0] / o[0] for o, b in zip(figures["ours"], figures["bare"], strict=True)]
    cpus = [b[1] / o[1] for o, b in zip(figures["ours"], figures["bare"], strict=True)]
    say(
        f"embed: {statistics.median(walls):.3f} of the bare wall speed ({min(walls):.3f} to "
        f"{max(walls):.3f}), {statistics.median(cpus):.3f} of the bare processor time "
        f"({min(cpus):.3f} to {max(cpus):.3f})\n"
    )


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process and those below it."""
    before, begun = _processor_s(), time.perf_counter()
    call()
    return time.perf_counter() - begun, _processor_s() - before


def _processor_s() -> float:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


_opened: dict[str, Any] = {}


def _open(directory: str) -> None:
    bundle = open_bundle(directory)
    _opened.update(session=session(bundle.encoder_onnx()), contract=bundle.contract)


def _bare(files: list[str]) -> int:
    for first in range(0, len(files), BATCH):
        pixels = [
            prepare(Path(name).read_bytes(), _opened["contract"])
            for name in files[first : first + BATCH]
        ]
        _opened["session"].run(["features", "embedding"], {"images": np.stack(pixels)})
    return len(files)


def load(folder: Path, directory: Path, count: int) -> None:
    bundle = open_bundle(directory)
    part = 10_000
    numbers = range(0, count, part)
    plan = Plan(
        bundle.model_id, "embedding", bundle.embedding_dim, "fp32", "folder", count, part,
        tuple(map(str, numbers)),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    with Output(folder / "vectors", plan) as output:
        for number, first in enumerate(numbers):
            rows = draw.standard_normal((min(part, count - first), bundle.embedding_dim))
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            ids = [(f"drawn/{first + i:08d}.jpg", first + i) for i in range(len(rows))]
            output.write(number, ids, rows.astype(np.float32), [])
        output.finish()
    state = folder / "state"
    command = [
        sys.executable, "-m", "service.load", str(folder / "vectors"),
        "--bundle", str(directory), "--state", str(state),
    ]  # fmt: skip
    for what in ("into an empty state", "again"):
        begun = time.perf_counter()
        before = os.times()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = os.times()
        processor_s = sum(after[2:4]) - sum(before[2:4])
        say(
            f"load {what}: {time.perf_counter() - begun:.1f} s wall, {processor_s:.1f} s of "
            f"processor; {done.stdout.partition(': ')[2]}"
        )
        sys.stdout.flush()
    size = (state / "operations.sqlite3").stat().st_size
    begun = time.perf_counter()
    gallery = LoggedGallery(state, bundle)
    say(
        f"the log has {size / 1e6:,.0f} MB; a gallery of {len(gallery.snapshot()):,} items is open "
        f"after {time.perf_counter() - begun:.1f} s\n"
    )
    gallery.close()


if __name__ == "__main__":
    main()
