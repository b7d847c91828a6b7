"""SIGKILL programs that add a folder, and compare what the gallery holds with the folder.

    python tests/faults/kill_add_folder.py --images 10000 --kills 20 --seed 0

One service runs throughout. Each round starts a process that calls add_folder() and kills it at a
random moment; the last one is let to its end. Then every picture of the folder must be an item,
once, and no item may have been written twice: the gallery's version, which grows by one with each
item that is written, says so. Fails (exit 1) with what is wrong.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from client import Client
from client.journal import Journal
from tests.faults.started import ROOT, Started
from tests.service.conftest import build_bundle

SIDE_PX = 16
PER_FOLDER = 100
PROGRAM = """
import sys
from client import Client
with Client(sys.argv[1]) as service:
    print(service.add_folder(sys.argv[2]))
"""


def prove(folder: Path, *, images: int, kills: int, seed: int) -> Counter[str]:
    """Add a folder of `images` pictures, killed `kills` times; returns counts of what was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    photos = write_pictures(folder / "photos", images, seed)
    journal = photos.with_name("photos.invprop-journal")
    bundle = build_bundle(folder / "bundle")
    with Started(bundle, folder / "state", log=folder / "log") as service:
        url = f"http://127.0.0.1:{service.port}"
        with Client(url) as client:
            before = client.info()
        last_lines = 0
        # Kills are spread over the whole of the work: each waits for a share of what is left.
        for left in range(kills, 0, -1):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, url, str(photos)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            lines_of_all = 2 * images // 32
            wanted = last_lines + draw.randrange(max(1, (lines_of_all - last_lines) // left))
            while process.poll() is None and lines_in(journal) <= wanted:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)
            process.kill()
            _, said = process.communicate()
            if process.returncode != -9 and process.returncode != 0:
                raise AssertionError(f"add_folder() failed by itself: {said.decode()}")
            seen["kills" if process.returncode == -9 else "ended before its kill"] += 1
            last_lines = lines_in(journal)
            if journal.exists():
                with Journal(journal) as book:
                    seen["parts that were on their way"] += len(book.kept.begun)
        with Client(url) as client:
            done = client.add_folder(photos)
            # A decoder that got no processor for long refuses a picture: as a user would, again.
            for _ in range(10):
                seen["refused and added again"] += len(done.refused)
                if not done.refused:
                    break
                done = client.add_folder(photos)
            after = client.info()
            ids = Counter(item.id for item in client.items(page_size=1000))
        wanted_ids = {path.relative_to(photos).as_posix() for path in photos.rglob("*.png")}
        if lost := wanted_ids - set(ids):
            raise AssertionError(f"{len(lost)} pictures are missing, {sorted(lost)[:3]} among them")
        if max(ids.values()) != 1 or len(ids) != images + before.gallery["items"]:
            raise AssertionError(f"{len(ids)} items, wanted {images} more than before, each once")
        if done.already + done.added + done.updated != images:
            raise AssertionError(f"the last call says {done}")
        written = after.gallery_version - before.gallery_version
        seen["written twice"] = written - images
        if written != images:
            raise AssertionError(f"{written} writes for {images} pictures")
        seen["left for the last call"] = done.added
    return seen


def lines_in(journal: Path) -> int:
    """How far a program has come."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def write_pictures(root: Path, count: int, seed: int) -> Path:
    """Noise as PNG files, a hundred to a folder."""
    pixels = np.random.default_rng(seed)
    for number in range(count):
        path = root / f"{number // PER_FOLDER:03d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = pixels.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        Image.fromarray(picture).save(path, compress_level=0)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(Path(folder), images=options.images, kills=options.kills, seed=options.seed)
    told = ", ".join(f"{what}: {count}" for what, count in sorted(seen.items()))
    sys.stdout.write(
        f"{options.images} pictures, seed {options.seed}: {told}\n"
        f"complete, each once; {time.monotonic() - began:.0f} s\n"
    )


if __name__ == "__main__":
    main()
