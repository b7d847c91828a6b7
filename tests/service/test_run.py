"""python -m service.run as its operator sees it: real processes, signals, exit codes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.run import listen
from service.settings import Settings
from trainer.representation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
WAIT_S = 60


class Process:
    """A running service."""

    def __init__(self, *arguments: object, log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "service.run", *map(str, arguments)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ready(self) -> str:
        """Wait for the line that says it is ready; return the URL."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), self.log.read_text()
        return line.split()[1]

    def failed(self) -> str:
        """Wait for its end and return its last words."""
        assert self.popen.wait(WAIT_S) == 1
        lines = self.log.read_text().strip().splitlines()
        assert "Traceback" not in self.log.read_text()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """run(flag, value, ...) -> a process that is ended with the test."""
    started: list[Process] = []

    def _run(*arguments: object) -> Process:
        log = tmp_path / f"log-{len(started)}"
        started.append(Process("--port", 0, "--decoder-processes", 1, *arguments, log=log))
        return started[-1]

    yield _run
    for process in started:
        process.end()


def test_service__keeps_what_it_answered_when_killed_and_ends_cleanly(
    run: Callable[..., Process],
    bundle_directory: Path,
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> None:
    state = ("--bundle", bundle_directory, "--state", tmp_path / "state")
    first = run(*state)
    url = first.ready()
    parts = [("images", (name, picture(n))) for n, name in enumerate(("a.png", "%2F/b?.png"))]
    answer = httpx2.post(f"{url}/items", files=parts, timeout=WAIT_S).json()
    assert (answer["added"], answer["gallery_version"]) == (2, 42)
    deleted = httpx2.delete(f"{url}/items/train/0000.png", timeout=WAIT_S).json()
    assert deleted["gallery_version"] == 43
    vector = httpx2.get(f"{url}/items/a.png?include=vector", timeout=WAIT_S).json()["vector"]

    second = run(*state)  # while the first one lives
    assert f"in use by process {first.popen.pid}" in second.failed()

    first.popen.send_signal(signal.SIGKILL)
    assert first.popen.wait(WAIT_S) == -signal.SIGKILL

    third = run(*state)
    url = third.ready()
    gallery = httpx2.get(f"{url}/info", timeout=WAIT_S).json()["gallery"]
    assert (gallery["items"], gallery["version"]) == (41, 43)
    item = httpx2.get(f"{url}/items/a.png?include=vector", timeout=WAIT_S).json()
    assert item["vector"] == vector
    odd = httpx2.get(f"{url}/items/%252F/b%3F.png", timeout=WAIT_S)
    assert odd.json()["id"] == "%2F/b?.png"
    assert httpx2.get(f"{url}/items/train/0000.png", timeout=WAIT_S).status_code == 404
    query = {"images": ("q.png", picture(0))}
    found = httpx2.post(f"{url}/neighbours?k=1", files=query, timeout=WAIT_S).json()
    assert found["results"][0][0]["id"] == "a.png"

    third.popen.terminate()
    assert third.popen.wait(WAIT_S) == 0
    entries = [json.loads(line) for line in third.log.read_text().splitlines()]
    assert {"gallery_loaded", "request"} <= {entry["event"] for entry in entries}
    assert all("a.png" not in json.dumps(entry) for entry in entries)  # no user data in logs


def test_service__says_it_is_not_ready_before_it_stops(
    run: Callable[..., Process], bundle_directory: Path, tmp_path: Path
) -> None:
    process = run("--bundle", bundle_directory, "--state", tmp_path / "s", "--drain-delay-s", 30)
    url = process.ready()
    process.popen.terminate()
    answer: Any = httpx2.get(f"{url}/readyz")
    while answer.status_code == 200:
        answer = httpx2.get(f"{url}/readyz")
    assert answer.json()["checks"]["accepting"] == "the service is stopping"
    assert httpx2.get(f"{url}/items").status_code == 200  # still serving
    process.popen.send_signal(signal.SIGINT)  # a second signal does not wait
    assert process.popen.wait(20) == 0


@pytest.mark.parametrize("name", ["encoder.onnx", "gallery/embeddings.npy", "manifest.json"])
def test_service__refuses_a_changed_bundle_and_names_the_file(
    run: Callable[..., Process], make_bundle: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    content = (bundle / name).read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if name == "manifest.json":  # a lie that is still JSON
        changed = content.replace(b'"epochs": 0', b'"epochs": 9')
        assert changed != content
    (bundle / name).write_bytes(changed)
    message = run("--bundle", bundle, "--state", tmp_path / "state").failed()
    assert name in message
    assert not (tmp_path / "state").exists()


def test_service__says_which_graph_embeds(
    run: Callable[..., Process], varied_directory: Path, tmp_path: Path
) -> None:
    state = ("--bundle", varied_directory, "--state", tmp_path / "state")
    message = run(*state, "--precision", "fp16").failed()
    assert "precision = fp16 was asked for, but" in message
    assert "its smallest cosine to fp32 is 0.9. Choose one of fp32, int8, or auto" in message
    process = run(*state, "--precision", "auto")
    url = process.ready()
    assert httpx2.get(f"{url}/info", timeout=WAIT_S).json()["precision"] == "int8"
    process.popen.terminate()
    assert process.popen.wait(WAIT_S) == 0
    entries = [json.loads(line) for line in process.log.read_text().splitlines()]
    (loaded,) = [entry for entry in entries if entry["event"] == "encoder_loaded"]
    assert (loaded["precision"], loaded["asked"]) == ("int8", "auto")


def test_service__refuses_a_damaged_variant_that_it_would_not_even_use(
    run: Callable[..., Process], varied_directory: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(varied_directory, copied)
    content = bytearray((copied / "encoder.int8.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "encoder.int8.onnx").write_bytes(content)
    message = run("--bundle", copied, "--state", tmp_path / "state").failed()
    assert f"{copied / 'encoder.int8.onnx'} is damaged or was replaced" in message


def test_service__says_what_is_wrong_with_its_flags(run: Callable[..., Process]) -> None:
    assert "--state (INVPROP_STATE) is required" in run("--bundle", "b").failed()


def test_service__says_that_its_state_cannot_be_made(
    run: Callable[..., Process], bundle_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    message = run("--bundle", bundle_directory, "--state", tmp_path / "file" / "state").failed()
    assert "state cannot be used: Not a directory; give --state" in message


def test_listener__sends_small_answers_at_once(tmp_path: Path) -> None:
    settings = Settings.model_validate({"bundle": tmp_path, "state": tmp_path, "port": 0})
    with listen(settings) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_service__says_when_its_port_is_taken(run: Callable[..., Process], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = run("--bundle", tmp_path, "--state", tmp_path, "--port", port)
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in process.failed()


def test_service__takes_over_a_new_bundle_on_sighup(
    run: Callable[..., Process],
    bundle_directory: Path,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> None:
    link, beside = tmp_path / "current", tmp_path / "next"
    link.symlink_to(bundle_directory)
    new = open_bundle(make_bundle(tmp_path / "new", seed=5))
    process = run("--bundle", link, "--state", tmp_path / "state", "--originals", "keep")
    url = process.ready()
    httpx2.post(f"{url}/items", files={"images": ("a", picture(1))}, timeout=WAIT_S)
    beside.symlink_to(new.directory)
    beside.rename(link)
    process.popen.send_signal(signal.SIGHUP)
    tick = threading.Event()
    while httpx2.get(f"{url}/info", timeout=WAIT_S).json()["model"] != new.model_id:
        assert process.popen.poll() is None
        tick.wait(0.05)
    assert httpx2.get(f"{url}/items/a", timeout=WAIT_S).json()["model"] == new.model_id
    process.popen.terminate()
    assert process.popen.wait(WAIT_S) == 0
    assert "switch_done" in process.log.read_text()
