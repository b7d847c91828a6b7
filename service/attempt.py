"""One attempt at one evaluation: a child process, and the lease that is renewed while it runs.

In: a leased job. Out: the job ended with its report or its error, or given back. The child is
`python -m trainer.evaluate` in a process group of its own, so that a hang, a crash or a lack of
memory costs it alone; what it leaves running is killed with it. Nothing of the trainer is imported.
"""

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson
import structlog

from service.gallery.protocol import StorageError
from service.job import GPU, Lease
from service.jobs import Jobs

COMMAND = (sys.executable, "-m", "trainer.evaluate")
INTERRUPTED = "interrupted"  # what trainer.evaluate says after SIGTERM
LOG_BYTES = 8192  # kept of what a failed child said on stderr
_LINE_BYTES = 64 * 1024
_LOOK_S = 0.1
_BEAT_S = 2.0  # at least so often, so that a cancelled job ends soon
_GRACE_S = 3.0  # between SIGTERM and SIGKILL
_MAX_REPORT_BYTES = 64 * 2**20

_log = structlog.get_logger("service.evaluations")


@dataclass(frozen=True)
class Limits:
    """What a child may take."""

    wall_s: float
    memory_bytes: int = 0  # address space; 0: any


class JobRefused(Exception):
    """The job cannot be run here; `code` says why to programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def attempt(
    jobs: Jobs,
    lease: Lease,
    *,
    describe: Callable[[Lease], Mapping[str, Any]],
    directory: Path,
    limits: Limits,
    stopping: Callable[[], bool],
    command: Sequence[str] = COMMAND,
) -> str:
    """Run a job to its end, or until it is cancelled, lost, or the worker stops.

    Args:
        describe: job.json of the lease; JobRefused where the job cannot be run here.
        directory: where the attempt works; removed at the end.
        stopping: whether the worker wants to end: the job is given back.

    Returns:
        what became of it: succeeded, failed, cancelled, given_back, crashed, lost.
    """
    job_id, fence = lease.job.id, lease.fence
    try:
        values = describe(lease)
    except JobRefused as error:
        jobs.fail(job_id, fence, {"code": error.code, "message": str(error)})
        return "failed"
    output = directory / "output"
    try:
        output.mkdir(parents=True)
        (directory / "job.json").write_bytes(orjson.dumps(values))
    except OSError as error:
        message = f"{error.strerror} in the state directory of the worker; free space there"
        jobs.fail(job_id, fence, {"code": "storage_failed", "message": message})
        return "failed"
    try:
        with _Child(command, directory / "job.json", output, limits.memory_bytes) as child:
            verdict = _watch(jobs, lease, child, limits, stopping)
            child.end(gently=verdict != "lost")
        if verdict is None and child.interrupted and stopping():
            verdict = "given_back"  # a service manager signals the worker and its child alike
        if verdict is None:
            return _settle(jobs, lease, child, output)
        if verdict == "time_limit":
            message = (
                f"it took longer than the {limits.wall_s:g} s that `evaluation_timeout_s` allows"
            )
            jobs.fail(job_id, fence, child.error("time_limit", message))
            return "failed"
        if verdict == "cancelled":
            jobs.cancelled(job_id, fence)
        elif verdict == "given_back":
            jobs.give_back(job_id, fence)
        return verdict
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # of no use any more; the job has ended


def _watch(
    jobs: Jobs, lease: Lease, child: "_Child", limits: Limits, stopping: Callable[[], bool]
) -> str | None:
    """Renew the lease while the child runs; None when it has ended by itself."""
    begun = beaten = time.monotonic()
    held_until = begun + jobs.lease_s
    while child.code() is None:
        time.sleep(_LOOK_S)
        now = time.monotonic()
        if stopping():
            return "given_back"
        if now - begun > limits.wall_s:
            return "time_limit"
        if now - beaten < min(_BEAT_S, jobs.lease_s / 4):
            continue
        beaten = now
        try:
            beat = jobs.beat(lease.job.id, lease.fence, child.progress)
        except StorageError as error:
            _log.warning("lease_not_renewed", job=lease.job.id, reason=str(error))
            if now > held_until:  # somebody else may have it by now
                return "lost"
            continue
        if not beat.held:
            return "lost"
        if beat.cancel:
            return "cancelled"
        held_until = now + jobs.lease_s
    return None


def _settle(jobs: Jobs, lease: Lease, child: "_Child", output: Path) -> str:
    """End the job by what its child left."""
    job_id, fence, code = lease.job.id, lease.fence, child.code()
    if code == 0:
        try:
            document = _bounded(output / "report.json")
            page = _bounded(output / "report.html")
            orjson.loads(document)
        except (OSError, ValueError) as error:
            message = f"the evaluation ended well, but its report cannot be read: {error}"
            jobs.fail(job_id, fence, child.error("report_unreadable", message))
            return "failed"
        return "succeeded" if jobs.succeed(job_id, fence, document, page) else "lost"
    assert code is not None
    if child.interrupted:
        message = "its process was asked to end, by SIGTERM or SIGINT, and not by its worker"
        jobs.crashed(job_id, fence, child.error(INTERRUPTED, message))
        return "crashed"
    if child.said is not None:  # it knew what was wrong: another try would find the same
        jobs.fail(job_id, fence, child.error(child.said["code"], child.said["message"]))
        return "failed"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        message = f"its process was killed by {name}"
        if -code == signal.SIGKILL:
            message += ": by the kernel for want of memory, or by somebody"
        jobs.crashed(job_id, fence, child.error("killed", message))
        return "crashed"
    message = f"its process ended with exit code {code} and said nothing for people"
    jobs.crashed(job_id, fence, child.error("crashed", message))
    return "crashed"


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > _MAX_REPORT_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_REPORT_BYTES:,} bytes")
    return path.read_bytes()


class _Child:
    """The process, what it says, and the end of it and of all that it started."""

    def __init__(self, command: Sequence[str], job: Path, output: Path, memory_bytes: int) -> None:
        self.progress: Mapping[str, Any] | None = None
        self.said: dict[str, str] | None = None  # its error: code, message
        self._log: collections.deque[bytes] = collections.deque(maxlen=64)
        tether = [sys.executable, "-m", "service.tethered", str(memory_bytes)]
        self._process = subprocess.Popen(
            [*tether, *command, "--job", str(job), "--output", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_lines, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(gently=False)

    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def interrupted(self) -> bool:
        """Whether it says that a signal ended it: nothing is wrong with its job."""
        return self.said is not None and self.said["code"] == INTERRUPTED

    def error(self, code: str, message: str) -> dict[str, str]:
        """What is kept of a failed job."""
        log = b"".join(self._log)[-LOG_BYTES:].decode(errors="replace")
        return {"code": code, "message": message, "log": log}

    def end(self, *, gently: bool) -> None:
        """Kill the whole group; with time to put things away where the process still runs."""
        if gently and self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self._signal(signal.SIGKILL)  # what it started may run although it has ended
        self._process.wait()
        for reader in self._readers:
            reader.join(_GRACE_S)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(self._process.pid, number)

    def _read_lines(self, stream: IO[bytes]) -> None:
        while line := stream.readline(_LINE_BYTES):
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError:
                self._log.append(line)
                continue
            if not isinstance(values, dict):
                continue
            if {"stage", "done", "total"} <= values.keys():
                self.progress = {name: values[name] for name in ("stage", "done", "total")}
            elif isinstance(values.get("error"), dict):
                found = values["error"]
                self.said = {
                    "code": str(found.get("code", "failed"))[:64],
                    "message": str(found.get("message", ""))[:4096],
                }

    def _read_log(self, stream: IO[bytes]) -> None:
        while chunk := os.read(stream.fileno(), 1024):
            self._log.append(chunk)


def device_of(queue: str) -> str:
    """Where the jobs of a queue run."""
    return "cuda" if queue == GPU else "cpu"
