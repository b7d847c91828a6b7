"""Real processes on loopback: a small folder of pictures, a training, a service."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

# The smallest real training: two passes of a small network over 48 pictures.
TINY = (
    "epochs=2",
    "batch_size=16",
    "loss.warmup_epochs=1",
    "loss.num_background=24",
    "bank.num_neighbours=3",
    "encoder.backbone=small",
    "encoder.image_size_px=32",
    "data.workers=0",
    "data.holdout=0.0",
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of three kinds, JPEG and PNG, in folders with blanks and umlauts."""
    folder = tmp_path_factory.mktemp("my pictures")
    random = np.random.default_rng(0)
    for kind, name in enumerate(("bars", "dots ü", "plain/deep")):
        (folder / name).mkdir(parents=True)
        for number in range(16):
            # Few and large patches of any colour: pictures that differ from each other.
            patches = random.integers(0, 256, (2 + kind, 3, 3), dtype=np.uint8)
            pixels = np.kron(patches, np.ones((40 // (2 + kind), 18, 1), np.uint8))
            suffix = "jpg" if number % 2 else "png"
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.{suffix}")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def bundle(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained on `pictures` by the real command."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    command = [sys.executable, "-m", "trainer.run", "folder", *TINY]
    done = subprocess.run(
        [*command, "--data", str(pictures), "--output", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return run / "bundle"


@contextlib.contextmanager
def serving(bundle: Path, state: Path) -> Iterator[str]:
    """A service process on a free port: gives its URL, ends it with SIGTERM, wants exit code 0."""
    command = [sys.executable, "-m", "service.run", "--bundle", str(bundle), "--state", str(state)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INVPROP_")}
    with (
        (state.parent / "service.log").open("w") as log,
        subprocess.Popen(
            [*command, "--port", "0"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # it says one line when it is ready, or ends
            assert line.startswith("ready: http://"), Path(log.name).read_text()
            yield line.split()[1]
            process.terminate()
            assert process.wait(timeout=30) == 0, Path(log.name).read_text()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def serve() -> Callable[[Path, Path], contextlib.AbstractContextManager[str]]:
    return serving
