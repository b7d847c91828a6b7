"""A worker of the evaluations as a child of the service: `--worker embedded`.

In: the service's settings. Out: a process `celery -A service.worker worker -Q cpu` that is started
again, after longer and longer waits, whenever it ends, and that ends with the service.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import structlog

from service.settings import Settings

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_WELL_AFTER_S = 120.0  # a worker that ran for so long is no worker that cannot start
_GRACE_S = 10.0

_log = structlog.get_logger("service.evaluations")


class EmbeddedWorker:
    """The child and the thread that watches over it; `close` ends both."""

    def __init__(self, settings: Settings) -> None:
        self._environment = {**os.environ, **settings.environment(), "CELERY_APP": ""}
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the child: a job that it works on is given back."""
        self._ending.set()
        process = self._process
        if process is not None:
            _signal(process, signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
        self._thread.join()

    def _run(self) -> None:
        # This thread lives as long as the service: the kernel ties the child to its starter.
        wait_s = _FIRST_WAIT_S
        while not self._ending.is_set():
            began = time.monotonic()
            command = [sys.executable, "-m", "celery", "-A", "service.worker", "worker"]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.tethered", "0", *command, "-Q", "cpu",
                 "--loglevel", "warning", "--without-gossip", "--without-mingle"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                start_new_session=True,  # Ctrl-C is for the service, which ends its worker
            )  # fmt: skip
            if self._ending.is_set():
                _signal(self._process, signal.SIGTERM)
            code = self._process.wait()
            if self._ending.is_set():
                return
            ran_s = time.monotonic() - began
            wait_s = _FIRST_WAIT_S if ran_s > _WELL_AFTER_S else min(2 * wait_s, _LONGEST_WAIT_S)
            _log.warning("worker_ended", exit_code=code, ran_s=round(ran_s, 1), again_in_s=wait_s)
            self._ending.wait(wait_s)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """To the group: service.tethered stands between us and the worker."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
