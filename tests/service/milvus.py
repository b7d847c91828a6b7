"""A Milvus of our own: milvus-lite as a process on loopback, from an environment of its own.

It brings faiss-cpu, which must never stand beside faiss-gpu: so it is installed once, into an
environment below the user's cache, and the tests are skipped with the reason where that fails.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

PACKAGES = ("milvus-lite==3.2.2", "pymilvus==3.0.2")
INSTALL_S, START_S = 300, 60


@dataclass
class Milvus:
    """A server that can be killed and started again on what it has kept."""

    program: Path
    directory: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    def start(self) -> None:
        """Start, and wait until it listens."""
        arguments = ["server", "--data-dir", self.directory / "data", "--host", "127.0.0.1"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, *map(str, arguments), "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise AssertionError((self.directory / "log").read_text()[-2000:])

    def kill(self) -> None:
        """End it at once, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def url(self, collection: str) -> str:
        """The URL of one of its collections."""
        return f"milvus://127.0.0.1:{self.port}/{collection}"


@pytest.fixture(scope="session")
def milvus() -> Iterator[Milvus]:
    """A server with no collection of ours."""
    program = installed()
    directory = Path(tempfile.mkdtemp(prefix="invprop-milvus-"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Milvus(program, directory, port)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()
        shutil.rmtree(directory)


_numbers = count()


@pytest.fixture
def new_collection(milvus: Milvus) -> Callable[[], str]:
    """new_collection() -> the URL of a collection that is not there."""
    return lambda: milvus.url(f"gallery_{next(_numbers)}")


def installed() -> Path:
    """The program of milvus-lite, installed where it is not yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "invprop-tests"
    name = "-".join((*PACKAGES, f"{sys.version_info[0]}.{sys.version_info[1]}"))
    home = cache / name.replace("=", "")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (home / "complete").exists():
                shutil.rmtree(home, ignore_errors=True)
                venv.create(home, with_pip=True)
                pip = [home / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES]
                subprocess.run(pip, check=True, capture_output=True, timeout=INSTALL_S)
                (home / "complete").touch()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        pytest.skip(f"no Milvus here: {' '.join(PACKAGES)} cannot be installed: {said[-300:]!r}")
    return home / "bin" / "milvus-lite"
