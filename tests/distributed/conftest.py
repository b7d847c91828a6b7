"""Real processes on this host, started as torchrun starts them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
Process = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """See `_starting`."""
    with _starting() as begin:
        yield begin


@pytest.fixture(scope="module")
def start_for_module() -> Iterator[Callable[..., Process]]:
    """See `_starting`."""
    with _starting() as begin:
        yield begin


@contextlib.contextmanager
def _starting() -> Iterator[Callable[..., Process]]:
    """Start `python WORDS` from the root of the repository; what still runs at the end is killed.

    Its output is one text stream. `rank` and `size` are put into the environment as torchrun does,
    with a common `port`.
    """
    started: list[Process] = []

    def begin(words: Sequence[str], *, rank: int = 0, size: int = 1, port: int = 0) -> Process:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            # With the ranks that torchrun has started: they outlive it, and hold the pipe.
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.communicate()


@pytest.fixture
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find
