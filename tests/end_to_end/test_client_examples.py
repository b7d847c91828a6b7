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


def test_look_around__runs(url: str, photos: Path) -> None:
    done = run("client.examples.look_around", photos, "--url", url)
    assert done.returncode == 0, done.stderr
    assert "49 pictures, 1 refused" in done.stdout
    assert "lie among their own class" in done.stdout


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
