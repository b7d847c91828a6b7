"""A real `python -m service.run` on loopback, and what it and its children take of the machine.

In: a bundle, a state directory, settings. Out: its port, its processor seconds and its memory.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]
SAMPLES_A_SECOND = 20
_START_TIMEOUT_S = 120.0


class Started:
    """The service in a process of its own; use it as a context manager.

    Args:
        bundle: directory of the bundle.
        state: directory of the gallery.
        log: file for its stderr.
        settings: further settings, as keyword arguments of their names.
    """

    def __init__(self, bundle: Path, state: Path, *, log: Path, **settings: object) -> None:
        flags = {"bundle": bundle, "state": state, "port": 0, **settings}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.run"]
                + [part for n, v in flags.items() for part in (f"--{n.replace('_', '-')}", str(v))],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        assert self._process.stdout is not None
        watchdog = threading.Timer(_START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline().decode()
        watchdog.cancel()
        found = re.search(r"http://127\.0\.0\.1:(\d+) ", line)
        if found is None:
            self._process.kill()
            self._process.communicate()
            raise RuntimeError(f"the service did not start: {log.read_text()[-2000:]}")
        self.port = int(found[1])
        self._whole = psutil.Process(self._process.pid)
        self.peak_bytes = 0
        self._sampling = threading.Event()
        self._sampler: threading.Thread | None = None

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def resident_bytes(self) -> int:
        """Resident memory of the process and its children now; pages they share count for each."""
        taken = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):  # a child that was replaced in between
                taken += process.memory_info().rss
        return taken

    def cpu_s(self) -> float:
        """Processor seconds of the process, its children and those that it has waited for."""
        taken = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                taken += times.user + times.system
                taken += times.children_user + times.children_system
        return taken

    def watch_memory(self) -> None:
        """Begin to keep the largest `resident_bytes` in `peak_bytes`."""

        def sample() -> None:
            while not self._sampling.wait(1 / SAMPLES_A_SECOND):
                self.peak_bytes = max(self.peak_bytes, self.resident_bytes())

        self._sampler = threading.Thread(target=sample, daemon=True)
        self._sampler.start()

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> int:
        """End it as an operator would; its exit code."""
        self._sampling.set()
        if self._sampler is not None:
            self._sampler.join()
        if self.ended and self._process.stdout is not None and self._process.stdout.closed:
            return self._process.returncode  # stopped before
        self._process.terminate()
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        return self._process.returncode

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._whole, *self._whole.children(recursive=True)]
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
