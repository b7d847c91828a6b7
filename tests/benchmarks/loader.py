"""Images/s of the loader that decodes anew for each batch, against bare decoding on one core.

    python tests/benchmarks/loader.py FOLDER_OF_JPEGS            # 500 x 375, and as they are
    python tests/benchmarks/loader.py FOLDER_OF_JPEGS --images 2000 --repeats 5

Wanted: 0.9 of bare decoding x workers. On a machine that others use too the wall clock says little,
so CPU time is taken: of the decoding processes, which should be that of bare decoding in this
process and no more, and of this process, which bounds what any number of workers can bring.
Beside it the same with pickled images, as it was: what sending pixels through a pipe costs.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.augment import collate
from trainer.config import load_recipe
from trainer.datasets import ImageSource, open_source, reduced_picture
from trainer.decode_pool import DecodePool
from trainer.decoding import survey
from trainer.stock import CropStock

SIZE_PX = 224
BATCH = 64


def enlarge(root: Path, source: ImageSource, count: int) -> None:
    """ImageNet-like JPEGs of 500 x 375, quality 90."""
    for i in range(count):
        path = source.pictures[i]
        assert isinstance(path, Path)
        with Image.open(path) as image:
            made = image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        made.save(root / f"{i:05d}.jpg", quality=90)


def pickled(work: list[Path]) -> list[NDArray[np.uint8]]:
    """What a process did before: its images went back through a pipe."""
    return [reduced_picture(path, SIZE_PX) for path in work]


def measure(source: ImageSource, repeats: int) -> None:
    with DecodePool(2) as pool:
        limit = load_recipe("folder").data.model_copy(update={"resident_limit_bytes": 0})
        found = survey(source, pool, limit, size_px=SIZE_PX)
    count = len(found.source) // BATCH * BATCH
    batches = np.random.default_rng(0).permutation(len(found.source))[:count].reshape(-1, BATCH)
    pictures = found.source.pictures

    def bare() -> float:
        began = time.process_time()
        for i in batches.ravel():
            reduced_picture(pictures[i], SIZE_PX)
        return time.process_time() - began

    def by_pickling(pool: DecodePool) -> None:
        work = ([pictures[i] for i in indices] for indices in batches)
        for images in pool.stream(pickled, work):
            collate(images)

    def shared(stock: CropStock) -> None:
        for _ in stock.batches(batches):
            pass

    own: dict[str, list[tuple[float, float, float]]] = {}
    bares = []
    with contextlib.ExitStack() as stack:
        variants: dict[str, tuple[int, Callable[[], None]]] = {}
        for workers in (1, 2):
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            pool = stack.enter_context(DecodePool(workers))
            stock = CropStock(found.source, None, pool, size_px=SIZE_PX, sizes=found.sizes)
            variants[f"{name}, shared blocks"] = workers, functools.partial(shared, stock)
            variants[f"{name}, pickled"] = workers, functools.partial(by_pickling, pool)
        for _, run in variants.values():
            run()  # processes start
        for _ in range(repeats):
            bares.append(bare())
            for name, (_, run) in variants.items():
                before = time.perf_counter(), time.process_time(), children_seconds()
                run()
                after = time.perf_counter(), time.process_time(), children_seconds()
                taken = tuple(b - a for a, b in zip(before, after, strict=True))
                own.setdefault(name, []).append(taken)
    core = statistics.median(bares)
    height, width = found.sizes.max(axis=0)
    print(f"{count} JPEGs, reduced to at most {height} x {width}, batches of {BATCH}")
    each = 1e6 * core / count
    print(f"{'bare decoding':23s} {each:7.0f} us an image, {count / core:.0f}/s a core")
    for name, runs in own.items():
        wall, here, there = (statistics.median(each) for each in zip(*runs, strict=True))
        print(
            f"{name:23s} {1e6 * there / count:7.0f} us in workers ({core / there:.2f} of bare), "
            f"{1e6 * here / count:5.0f} us here ({count / here:.0f}/s at most); "
            f"{count / wall:.0f} images/s by the wall clock"
        )


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started and that live."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of JPEGs")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source = open_source(options.folder)
    chosen = np.linspace(0, len(source) - 1, options.images).astype(np.int64)
    source = source.subset(np.unique(chosen))
    with tempfile.TemporaryDirectory() as folder:
        enlarge(Path(folder), source, len(source))
        measure(open_source(folder), options.repeats)
    measure(source, options.repeats)


if __name__ == "__main__":
    main()
