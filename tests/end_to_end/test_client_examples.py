"""The client as people use it, against a real service: examples and the command line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.end_to_end.conftest import TINY
from tests.service.conftest import DIM, build_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(
    serve: Callable[[Path, Path], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("examples")
    with serve(build_bundle(folder / "bundle"), folder / "state") as url:
        yield url


@pytest.fixture
def photos(pictures: Path, tmp_path: Path) -> Path:
    """Pictures of three kinds, one of them twice under another name."""
    folder = tmp_path / "photos"
    shutil.copytree(pictures, folder)
    shutil.copy(folder / "bars" / "00.png", folder / "bars" / "copy of 00.png")
    return folder


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_deduplicate__finds_the_copy(url: str, photos: Path) -> None:
    done = run("client.examples.deduplicate", photos, "--url", url, "--similarity", 0.9999)
    assert done.returncode == 0, done.stderr
    pairs = [line.split("\t")[1] for line in done.stdout.splitlines()]
    assert {"bars/00.png", "bars/copy of 00.png"} <= set(pairs)
    assert "notes.txt: not called like a picture" in done.stderr


def test_look_around__from_training_to_the_probe_on_real_digits(
    serve: Callable[[Path, Path], AbstractContextManager[str]], tmp_path: Path
) -> None:
    """The three commands that the example names, on handwritten digits in folders by class."""
    digits, photos = load_digits(), tmp_path / "digits"
    for number, (image, label) in enumerate(
        zip(digits.images[:150], digits.target[:150], strict=True)
    ):
        path = photos / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(path)
    trained = run(
        "trainer.run",
        "folder",
        *TINY,
        "export.variants=[]",
        "--data",
        photos,
        "--output",
        tmp_path / "run",
    )
    assert trained.returncode == 0, trained.stderr
    with serve(tmp_path / "run" / "bundle", tmp_path / "state") as url:
        done = run("client.examples.look_around", photos, "--url", url)
    assert done.returncode == 0, done.stderr
    assert "150 pictures, 0 refused" in done.stdout
    assert "reached; the hardest positive is" in done.stdout
    probe = done.stdout.splitlines()[-1]
    assert float(probe.partition("%")[0]) > 40, done.stdout  # by chance a tenth


def test_command_line__add_search_export(url: str, photos: Path, tmp_path: Path) -> None:
    assert "added" in run("client", "--url", url, "add", photos).stdout
    near = run("client", "--url", url, "neighbours", photos / "bars" / "00.png", "-k", 2, "--json")
    ids = [n["id"] for n in json.loads(near.stdout)["neighbours"]]
    assert ids[0] in ("bars/00.png", "bars/copy of 00.png")
    done = run("client", "--url", url, "export", "--npy", tmp_path / "all.npy")
    assert done.returncode == 0, done.stderr
    names = (tmp_path / "all.npy.ids.jsonl").read_text().splitlines()
    assert np.load(tmp_path / "all.npy").shape == (len(names), DIM)


def test_command_line__whoever_reads_goes_away(url: str, photos: Path) -> None:
    command = f"{sys.executable} -m client --url {url} export | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 141)  # 0 where all of it went into the pipe
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_command_line__a_closed_terminal_leaves_no_file(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "client", "--url", url, "embed", "-", "--npy"]
    target = tmp_path / "out" / "vectors.npy"
    target.parent.mkdir()
    with subprocess.Popen(
        [*command, str(target)], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 30
        while not any(target.parent.iterdir()):  # it waits for paths, its files are begun
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 129
    assert list(target.parent.iterdir()) == []
