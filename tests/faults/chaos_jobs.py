"""Evaluations while their workers, children and broker are killed: none may be lost or done twice.

Run: python -m tests.faults.chaos_jobs --jobs 500 --broker filesystem|redis [--pause-s 60]

Out: a report as JSON and exit code 0, or 1 with what was violated. Real workers (Celery, processes,
leases, table), only the evaluation itself is a fake that ends at once. A third of the jobs is
stored without a message, as by a service killed between row and message; a third is rung for three
times.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from service.doorbell import Doorbell, celery_application
from service.jobs import CPU, Jobs, Request
from service.settings import Settings
from tests.service.conftest import build_bundle
from trainer.representation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
LEASE_S = 5.0
LATE_S = 60.0  # `running` so long after the lease ended is a violation
RERUN_S = 15.0  # a killed worker's job runs again within its lease and this
STUCK_S = 60.0
TICK_S = 0.2


class Redis:
    """A redis-server of our own that keeps its messages on disk."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._directory = directory
        directory.mkdir()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "yes", "--dir", str(self._directory)],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def flush(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            connection.recv(64)

    def pause(self, seconds: float) -> None:
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)


class Chaos:
    """The table, the workers and what is done to them."""

    def __init__(self, directory: Path, *, broker: str, workers: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.redis = Redis(directory / "redis") if broker == "redis" else None
        self.state = directory / "state"
        self.state.mkdir()
        (directory / "datasets.yaml").write_text("set: {kind: folder, root: nowhere}\n")
        bundle = build_bundle(directory / "bundle")
        self.settings = Settings(
            bundle=bundle,
            state=self.state,
            datasets=directory / "datasets.yaml",
            evaluation_lease_s=LEASE_S,
            broker=None if self.redis is None else self.redis.url,
            log_level="warning",
        )
        self.model = open_bundle(bundle).model_id
        self.jobs = Jobs(self.state, lease_s=LEASE_S)
        self.doorbell = Doorbell(
            celery_application(self.state, self.settings.broker_url(), limit_s=600)
        )
        self.pids = directory / "pids"
        self.log = (directory / "workers.log").open("wb")
        self.wanted = workers
        self.workers: list[subprocess.Popen[bytes]] = []
        self.done: Counter[str] = Counter()

    def submit(self, *, rings: int, **settings: Any) -> str:
        values = {"pids": str(self.pids), **settings}
        job, _ = self.jobs.submit(Request("knn", "set", values, 0, self.model, CPU))
        for _ in range(rings):
            self.doorbell.ring(job.id, CPU)
        return job.id

    def keep_workers(self) -> None:
        """What a supervisor does: whoever ended is started again."""
        for worker in [w for w in self.workers if w.poll() is not None]:
            self.done[f"worker exit {worker.returncode}"] += 1
            self.workers.remove(worker)
        while len(self.workers) < self.wanted:
            self.workers.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "celery",
                        "-A",
                        "tests.faults.fake_worker",
                        "worker",
                        "-Q",
                        CPU,
                        "--loglevel",
                        "warning",
                        "--without-gossip",
                        "--without-mingle",
                    ],
                    cwd=ROOT,
                    env={
                        **os.environ,
                        **self.settings.environment(),
                        "FAKE_STUCK_S": str(STUCK_S),
                        "OMP_NUM_THREADS": "1",
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=self.log,
                    start_new_session=True,
                )
            )

    def break_something(self) -> None:
        kinds = ["child", "worker", "worker", "stop", "flush"] + ["broker"] * (
            self.redis is not None
        )
        kind = self.random.choice(kinds)
        if kind == "flush":
            if self.redis is not None:
                self.redis.flush()
            else:
                for message in (self.state / "broker" / "messages").glob("*"):
                    message.unlink(missing_ok=True)
        elif kind == "broker":
            assert self.redis is not None
            self.redis.restart()
        else:
            worker = self.random.choice(self.workers)
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if kind == "worker":
                    os.kill(worker.pid, signal.SIGKILL)
                elif kind == "stop":
                    os.kill(worker.pid, signal.SIGTERM)
                else:
                    below = psutil.Process(worker.pid).children(recursive=True)
                    if not below:
                        return
                    below[-1].kill()
        self.done[kind] += 1

    def rerun_after_kill(self) -> float:
        """Seconds from the SIGKILL of a worker to the next attempt at its job."""
        ready = self.pids.with_name(f"ready-{time.monotonic_ns()}")
        job_id = self.submit(rings=1, do="hang", ready=str(ready))
        while not ready.exists():
            self.keep_workers()
            time.sleep(TICK_S)
        job = self.jobs.get(job_id)
        assert job is not None
        (holder,) = [w for w in self.workers if psutil.Process(w.pid).children()]
        holder.kill()
        killed = time.monotonic()
        while True:
            self.keep_workers()
            found = self.jobs.get(job_id)
            assert found is not None
            if found.fence > job.fence and found.status == "running":
                took = time.monotonic() - killed
                self.jobs.cancel(job_id)
                return took
            time.sleep(0.05)

    def left_running(self) -> list[int]:
        """Processes of evaluations that are still there."""
        pids = {int(line) for line in self.pids.read_text().split()} if self.pids.exists() else ()
        return [pid for pid in pids if psutil.pid_exists(pid) and _is_fake(pid)]

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.log.close()
        self.jobs.close()
        if self.redis is not None:
            self.redis.kill()


def _is_fake(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "fake_evaluate.py" in " ".join(
            process.cmdline()
        )
    return False


@contextlib.contextmanager
def chaos(*, broker: str, workers: int, seed: int) -> Iterator[Chaos]:
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    made = Chaos(directory, broker=broker, workers=workers, seed=seed)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def run(
    *, jobs: int, broker: str, workers: int, seed: int, pause_s: float, every_s: float, end_s: float
) -> dict[str, Any]:
    """Submit, break, wait, and say what was found."""
    began = time.monotonic()
    wrong: list[str] = []
    with chaos(broker=broker, workers=workers, seed=seed) as world:
        world.keep_workers()
        ids = [world.submit(rings=(0, 1, 3)[n % 3], seconds=0.05) for n in range(jobs)]
        deadline, next_break, paused = began + end_s, time.monotonic() + every_s, False
        late: dict[str, float] = {}
        open_ids = set(ids)
        breaking_until = began + 0.6 * end_s
        while open_ids:
            now = time.monotonic()
            if now > deadline:
                wrong.append(f"{len(open_ids)} of {jobs} jobs have not ended in {end_s:g} s")
                break
            world.keep_workers()
            listed = {job.id: job for job in world.jobs.list(limit=jobs)}
            open_ids = {job_id for job_id in ids if not listed[job_id].ended}
            running = {job_id for job_id in open_ids if listed[job_id].status == "running"}
            late = {job_id: late.get(job_id, now) for job_id in running}
            wrong += [
                f"{job_id} has been running for {now - since:.0f} s"
                for job_id, since in late.items()
                if now - since > LEASE_S + LATE_S
            ]
            if pause_s and not paused and world.redis and len(open_ids) < 0.7 * jobs:
                paused = True
                world.redis.pause(pause_s)
                world.done["pause"] += 1
            if now > next_break and open_ids and now < breaking_until:
                world.break_something()
                next_break = now + every_s * world.random.uniform(0.5, 1.5)
            time.sleep(TICK_S)
        lasted = time.monotonic() - began
        ended = Counter(job.status for job in world.jobs.list(limit=jobs))
        found = {job.id: job for job in world.jobs.list(limit=jobs)}
        reports = sum(world.jobs.report(job_id) is not None for job_id in ids)
        if reports != ended["succeeded"]:
            wrong.append(f"{reports} reports for {ended['succeeded']} jobs that succeeded")
        executed = len(world.pids.read_text().split())
        attempts = sum(found[job_id].attempts for job_id in ids)
        rerun_s = world.rerun_after_kill()
        if rerun_s > LEASE_S + RERUN_S:
            wrong.append(f"a killed worker's job ran again after {rerun_s:.1f} s")
        give_up = time.monotonic() + 10
        while world.left_running() and time.monotonic() < give_up:
            time.sleep(TICK_S)
        if left := world.left_running():
            wrong.append(f"processes are left: {left}")
        directory = world.state / "broker" / "messages"
        return {
            "jobs": jobs, "broker": broker, "seed": seed, "lasted_s": round(lasted, 1),
            "ended": dict(ended), "reports": reports, "started": executed, "attempts": attempts,
            "broken": dict(world.done), "rerun_after_worker_kill_s": round(rerun_s, 1),
            "messages_left": len(list(directory.glob("*"))) if directory.is_dir() else None,
            "wrong": wrong,
        }  # fmt: skip


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos_jobs")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--broker", choices=["filesystem", "redis"], default="filesystem")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-s", type=float, default=60.0, help="of the broker; redis only")
    parser.add_argument("--every-s", type=float, default=4.0, help="between two faults")
    parser.add_argument("--end-s", type=float, default=1800.0, help="by when all have ended")
    found = run(**vars(parser.parse_args()))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
