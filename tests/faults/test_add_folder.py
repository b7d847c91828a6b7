"""The small form of kill_add_folder.py, the long one has thousands of pictures; and a service that
is killed and started again while a folder is added."""

import importlib.util
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from client import Client
from tests.faults.started import Started
from tests.service.conftest import build_bundle

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("kill_add_folder.py")


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("kill_add_folder", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_add_folder__killed_at_random_ends_complete(program: Any, tmp_path: Path) -> None:
    seen = program.prove(tmp_path, images=400, kills=3, seed=1)
    assert seen["kills"] >= 2
    assert seen["written twice"] == 0


@pytest.mark.long
def test_add_folder__the_service_restarts_in_the_middle(program: Any, tmp_path: Path) -> None:
    photos = program.write_pictures(tmp_path / "photos", 400, 2)
    journal, bundle = tmp_path / "photos.invprop-journal", build_bundle(tmp_path / "bundle")
    state, log = tmp_path / "state", tmp_path / "log"
    with Started(bundle, state, log=log) as service:
        url = f"http://127.0.0.1:{service.port}"
        with Client(url) as client:
            before = client.info()
        command = [sys.executable, "-c", program.PROGRAM, url, str(photos)]
        adding = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while program.lines_in(journal) < 6:  # parts are answered, others are on their way
            assert time.monotonic() < deadline
            assert adding.poll() is None
            time.sleep(0.002)
        service.kill()
    with Started(bundle, state, log=log, port=service.port):
        _, wrong = adding.communicate(timeout=60)
        if adding.returncode:  # the start took longer than its retries: again, as a user would
            assert b"ConnectionFailed" in wrong
        with Client(url) as client:
            assert client.add_folder(photos).refused == ()
            ids = Counter(item.id for item in client.items(page_size=1000))
            written = client.info().gallery_version - before.gallery_version
    assert {p.relative_to(photos).as_posix() for p in photos.rglob("*.png")} <= set(ids)
    assert max(ids.values()) == 1
    assert written == 400  # what was stored and not seen answered was not written again
