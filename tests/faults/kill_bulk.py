"""SIGKILL bulk embedding and loading at random moments, and compare with what one go gives.

    python tests/faults/kill_bulk.py --kills 100 --seed 0

`service.embed` is killed again and again on one output until it is done, then `service.load` on one
state, then both begin anew. After every kill each part that the manifest names must be whole, and
no file of a part cut short; at the end every file must be the bytes of one go, and the gallery must
be sound with exactly the items that were embedded. Fails (exit 1) with what is wrong.
"""

import argparse
import contextlib
import io
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[2]))

from service import embed, load
from service.bulk.parts import MANIFEST, read_manifest, read_parts
from service.check import check
from service.gallery.database import Database
from tests.service.conftest import build_bundle, encoded

ROOT = Path(__file__).parents[2]
IMAGES, PARTITION = 400, 8  # fifty parts: most kills come while parts are written
BUNDLED = 6  # items of the bundle's gallery
AT_START = 0.2  # share of the kills before the first new part


def prove(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill so often, or a few times more; returns counts of what was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    bundle = build_bundle(folder / "bundle", images=BUNDLED)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(IMAGES):
        content = encoded(i % 7)
        (photos / f"{i:04d}.png").write_bytes(content if i % 50 else content[:60])
    reference, round_ = folder / "reference", 0
    _run(_embed(photos, bundle, reference))
    good = sum(part["rows"] for part in read_manifest(reference).parts.values())
    each = max(1, min(10, kills // 2))  # of one run
    while seen["kills"] < kills:
        round_ += 1
        output, state = folder / f"output-{round_}", folder / f"state-{round_}"
        for _ in range(each):
            if not _killed(_embed(photos, bundle, output), output, draw, seen):
                break
            seen["parts seen"] += _check_parts(output)
        _run(_embed(photos, bundle, output))
        _compare(output, reference)
        loading = ["load", str(output), "--bundle", str(bundle), "--state", str(state)]
        for _ in range(each):
            if not _killed(loading, state, draw, seen):
                break
            if (state / "begun").exists():
                seen["items seen"] += _check_gallery(state)
        _run(loading)
        assert _check_gallery(state) == good + BUNDLED
        seen["rounds"] += 1
    return seen


def _embed(photos: Path, bundle: Path, output: Path) -> list[str]:
    return [
        "embed", str(photos), "--bundle", str(bundle), "--output", str(output),
        "--partition-images", str(PARTITION),
    ]  # fmt: skip


def _run(arguments: Sequence[str]) -> None:
    """To its end, in this process."""
    said = io.StringIO()
    main_of = {"embed": embed.main, "load": load.main}[arguments[0]]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main_of(arguments[1:])
    assert code == 0, said.getvalue()


def _killed(
    arguments: Sequence[str], directory: Path, draw: random.Random, seen: Counter[str]
) -> bool:
    """Kill it at a random moment; False where it was done before that."""
    command = [sys.executable, "-m", f"service.{arguments[0]}", *arguments[1:]]
    begun = _stamp(directory)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        if draw.random() >= AT_START:  # from its first write on
            while _stamp(directory) == begun and process.poll() is None:
                time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.communicate()
    if process.returncode == 0:
        return False
    assert process.returncode == -9, process.returncode
    seen["kills"] += 1
    seen[f"kills of {arguments[0]}"] += 1
    return True


def _stamp(directory: Path) -> object:
    """What changes when something is written there."""
    if not directory.is_dir():
        return None
    names = (path.stat() for path in directory.glob("[mo]*.*"))  # manifest, operations
    return sorted((s.st_mtime_ns, s.st_size) for s in names)


def _check_parts(output: Path) -> int:
    """Everything that is there must be whole; returns the parts that count."""
    for path in output.glob("part-*.npy"):
        np.load(path, allow_pickle=False)
    for path in output.glob("part-*.parquet"):
        parquet.read_table(path)
    if not (output / MANIFEST).exists():
        return 0
    return len(list(read_parts(output, read_manifest(output))))


def _compare(output: Path, reference: Path) -> None:
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in reference.iterdir()}
    for name in names:
        if not name.endswith(".npy"):  # of the same images in other batches: to the last digits
            assert (output / name).read_bytes() == (reference / name).read_bytes() or (
                name == MANIFEST
            ), name
        else:
            np.testing.assert_allclose(np.load(output / name), np.load(reference / name), atol=1e-6)


def _check_gallery(state: Path) -> int:
    database = Database(state)  # takes back what was under way
    database.close()
    database = Database(state, make=False)
    report = check(database)
    database.close()
    assert report.is_sound, report.problems
    return sum(gallery.items for gallery in report.galleries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(Path(folder), given.kills, given.seed)
    sys.stdout.write(f"nothing lost, nothing cut short: {dict(seen)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
