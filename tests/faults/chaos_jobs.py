"""Evaluations while their workers, children, broker and service are killed: none may be lost.

Run: python -m tests.faults.chaos_jobs --jobs 500 --broker filesystem|redis|amqp [--pause-s 60]

Out: a report as JSON and exit code 0, or 1 with what was violated. Real workers (Celery, processes,
leases, table), only the evaluation itself is a fake that takes up to a second. Of the jobs that are
there at the beginning a third has no message, a third has three; while they run, one fault follows
another in random order, each kind as often as any other: see `Chaos.faults`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import psutil

from service.doorbell import Doorbell, celery_application
from service.job import CPU, RUNNING, SUCCEEDED, Job, Request
from service.jobs import MAX_ATTEMPTS, Jobs
from service.settings import Settings
from tests.faults import brokers
from tests.service.conftest import build_bundle
from trainer.representation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
LEASE_S = 5.0
LATE_S = 60.0  # `running` so long after the lease ended is a violation
RERUN_S = 15.0  # a killed worker's job runs again within its lease and this
CANCEL_S = 10.0
STUCK_S = 60.0
TICK_S = 0.2
LONGEST_S = 1.0  # an evaluation


class Chaos:
    """The table, the workers and what is done to them."""

    def __init__(
        self, directory: Path, *, broker: str, workers: int, seed: int, lease_s: float
    ) -> None:
        self.random = random.Random(seed)
        self.state = directory / "state"
        self.state.mkdir()
        self.broker = brokers.MAKE[broker](directory / "broker", self.state)
        (directory / "datasets.yaml").write_text("set: {kind: folder, root: nowhere}\n")
        bundle = build_bundle(directory / "bundle")
        self.settings = Settings(
            bundle=bundle,
            state=self.state,
            datasets=directory / "datasets.yaml",
            evaluation_lease_s=lease_s,
            broker=self.broker.url,
            log_level="warning",
        )
        self.environment = {
            **os.environ,
            **self.settings.environment(),
            "FAKE_STUCK_S": str(STUCK_S),
            "OMP_NUM_THREADS": "1",
        }
        self.model = open_bundle(bundle).model_id
        self.jobs = Jobs(self.state, lease_s=lease_s)
        self.doorbell = Doorbell(
            celery_application(self.state, self.settings.broker_url(), limit_s=600)
        )
        self.pids = directory / "pids"
        self.log = (directory / "workers.log").open("wb")
        self.wanted = workers
        self.workers: list[subprocess.Popen[bytes]] = []
        self.done: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        self.faults: Mapping[str, Callable[[], None]] = {
            "child killed": self._kill_child,
            "worker killed": lambda: self._signal_worker(signal.SIGKILL),
            "worker stopped": lambda: self._signal_worker(signal.SIGTERM),
            "messages deleted": self.broker.flush,
            "service killed between row and message": self._accept_and_die,
        }
        if self.broker.url is not None:
            self.faults = {**self.faults, "broker killed": self.broker.restart}
        self._deck: list[str] = []

    def submit(self, *, rings: int, **settings: Any) -> str:
        values = {"pids": str(self.pids), **settings}
        job, _ = self.jobs.submit(Request("knn", "set", values, 0, self.model, CPU))
        for _ in range(rings):
            self.doorbell.ring(job.id, CPU)
        return job.id

    def all_jobs(self) -> dict[str, Job]:
        return {job.id: job for job in self.jobs.list(limit=1_000_000)}

    def keep_workers(self) -> None:
        """What a supervisor does: whoever ended is started again."""
        for worker in [w for w in self.workers if w.poll() is not None]:
            self.exits[str(worker.returncode)] += 1
            self.workers.remove(worker)
        while len(self.workers) < self.wanted:
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "tests.faults.fake_worker", "worker",
                     "-Q", CPU, "--loglevel", "warning", "--without-gossip", "--without-mingle"],
                    cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                    stdout=self.log, stderr=self.log, start_new_session=True,
                )
            )  # fmt: skip

    def break_something(self) -> None:
        # Whoever strikes one job MAX_ATTEMPTS times has made it poison, which is ended as failed or
        # lost: promised, and tried in test_worker. Here every job is to succeed.
        if any(
            job.status == RUNNING and job.attempts == MAX_ATTEMPTS
            for job in self.all_jobs().values()
        ):
            self.done["spared: a last attempt was running"] += 1
            return
        if not self._deck:
            self._deck = list(self.faults)
            self.random.shuffle(self._deck)
        kind = self._deck.pop()
        self.faults[kind]()
        self.done[kind] += 1

    def _signal_worker(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(self.workers).pid, number)

    def _kill_child(self) -> None:
        """The evaluation of some worker that works on one."""
        for worker in self.random.sample(self.workers, len(self.workers)):
            with contextlib.suppress(psutil.NoSuchProcess):
                if below := psutil.Process(worker.pid).children(recursive=True):
                    below[-1].kill()
                    return

    def _accept_and_die(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "tests.faults.dying_service"],
            cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, timeout=120,
        )  # fmt: skip

    def begun(self) -> str:
        """A job that hangs, once its child runs."""
        ready = self.pids.with_name(f"ready-{time.monotonic_ns()}")
        job_id = self.submit(rings=1, do="hang", ready=str(ready))
        self.until(ready.exists)
        return job_id

    def until(self, done: Callable[[], bool]) -> float:
        """Seconds until it is so; the workers are looked after meanwhile."""
        began = time.monotonic()
        while not done():
            self.keep_workers()
            time.sleep(0.05)
        return time.monotonic() - began

    def rerun_after_kill(self) -> float:
        """Seconds from the SIGKILL of a worker to the next attempt at its job."""
        job_id = self.begun()
        self.until(lambda: len(self._holders()) == 1)  # one that was being stopped gave it back
        fence = self._job(job_id).fence
        self._holders()[0].kill()
        took_s = self.until(lambda: self._job(job_id).fence > fence)
        self.cancelled(job_id)
        return took_s

    def cancelled(self, job_id: str) -> float:
        """Seconds from the cancelling of a job until it has ended and no process is left."""
        self.jobs.cancel(job_id)
        return self.until(lambda: self._job(job_id).ended and not self.left_running())

    def _holders(self) -> list[subprocess.Popen[bytes]]:
        """Workers that work on something."""
        return [w for w in self.workers if w.poll() is None and psutil.Process(w.pid).children()]

    def left_running(self) -> list[int]:
        """Processes of evaluations that are still there."""
        pids = {int(line) for line in self.pids.read_text().split()} if self.pids.exists() else ()
        return [pid for pid in pids if psutil.pid_exists(pid) and _is_fake(pid)]

    def effect(self, job_id: str) -> str:
        """Digest of a report; the fake writes its process id into it."""
        found = self.jobs.report(job_id)
        return hashlib.sha256(orjson.dumps(None if found is None else found[0])).hexdigest()

    def _job(self, job_id: str) -> Job:
        found = self.jobs.get(job_id)
        assert found is not None
        return found

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
        self.broker.close()


def _is_fake(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "fake_evaluate.py" in " ".join(
            process.cmdline()
        )
    return False


@contextlib.contextmanager
def chaos(*, broker: str, workers: int, seed: int, lease_s: float) -> Iterator[Chaos]:
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    made = Chaos(directory, broker=broker, workers=workers, seed=seed, lease_s=lease_s)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def run(
    *,
    jobs: int,
    broker: str,
    workers: int,
    seed: int,
    pause_s: float,
    every_s: float,
    end_s: float,
    lease_s: float = LEASE_S,
    reruns: int = 1,
) -> dict[str, Any]:
    """Submit, break, wait, and say what was found."""
    load, began = os.getloadavg(), time.monotonic()
    with chaos(broker=broker, workers=workers, seed=seed, lease_s=lease_s) as world:
        world.keep_workers()
        for number in range(jobs):
            seconds = world.random.uniform(0, LONGEST_S)
            world.submit(rings=(0, 1, 3)[number % 3], seconds=seconds)
        wrong, effects = _until_all_ended(world, jobs, pause_s, every_s, end_s)
        lasted_s = time.monotonic() - began
        found = world.all_jobs()
        ended = Counter(job.status for job in found.values())
        reports = sum(world.jobs.report(job_id) is not None for job_id in found)
        if not reports == ended[SUCCEEDED] == len(found):
            wrong.append(f"{reports} reports, {ended[SUCCEEDED]} succeeded, of {len(found)} jobs")
            wrong += [
                f"{job.id}: {job.status} after {job.attempts} attempts: {job.error}"
                for job in found.values()
                if job.status != SUCCEEDED
            ]
        wrong += [
            f"the report of {job_id} has changed"
            for job_id, effect in effects.items()
            if world.effect(job_id) != effect
        ]
        executed = len(world.pids.read_text().split())
        reruns_s = [world.rerun_after_kill() for _ in range(reruns)]
        wrong += [
            f"a killed worker's job ran again after {rerun_s:.1f} s"
            for rerun_s in reruns_s
            if rerun_s > lease_s + RERUN_S
        ]
        cancel_s = world.cancelled(world.begun())
        if cancel_s > CANCEL_S:
            wrong.append(f"a cancelled job and its processes were there for {cancel_s:.1f} s")
        directory = world.state / "broker" / "messages"
        return {
            "jobs": len(found), "broker": broker, "workers": workers, "seed": seed,
            "lease_s": lease_s, "lasted_s": round(lasted_s, 1), "ended": dict(ended),
            "reports": reports, "started": executed,
            "attempts": dict(sorted(Counter(job.attempts for job in found.values()).items())),
            "faults": dict(world.done), "exits of workers": dict(world.exits),
            "rerun_after_worker_kill_s": [round(rerun_s, 1) for rerun_s in reruns_s],
            "cancel_s": round(cancel_s, 1),
            "messages_left": len(list(directory.glob("*"))) if directory.is_dir() else None,
            "load": [round(load[0], 1), round(os.getloadavg()[0], 1)], "wrong": wrong,
        }  # fmt: skip


def _until_all_ended(
    world: Chaos, jobs: int, pause_s: float, every_s: float, end_s: float
) -> tuple[list[str], dict[str, str]]:
    """What was violated, and the effect of each job as it was first seen."""
    began = time.monotonic()
    next_break, paused = began + every_s, False
    wrong: list[str] = []
    expired: dict[tuple[str, int], float] = {}  # when a fence was last seen to be within its lease
    effects: dict[str, str] = {}
    while True:
        now = time.monotonic()
        world.keep_workers()
        found = world.all_jobs()
        for job in found.values():
            if job.status == SUCCEEDED and job.id not in effects:
                effects[job.id] = world.effect(job.id)
        unfinished = [job for job in found.values() if not job.ended]
        if not unfinished:
            break
        if now - began > end_s:
            wrong.append(f"{len(unfinished)} of {len(found)} jobs have not ended in {end_s:g} s")
            break
        for job in unfinished:
            if job.status == RUNNING:
                since = expired.setdefault((job.id, job.fence), now)
                if now - since > LONGEST_S + world.jobs.lease_s + LATE_S:
                    wrong.append(f"{job.id} has been running for {now - since:.0f} s")
                    expired[job.id, job.fence] = now
        if pause_s and not paused and world.broker.url and len(unfinished) < 0.7 * jobs:
            paused = True
            world.broker.pause(pause_s)
            world.done["broker frozen"] += 1
        if now > next_break and now - began < 0.6 * end_s:
            world.break_something()
            next_break = time.monotonic() + every_s * world.random.uniform(0.5, 1.5)
        time.sleep(TICK_S)
    return wrong, effects


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos_jobs")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--broker", choices=list(brokers.MAKE), default="filesystem")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-s", type=float, default=60.0, help="of the broker's process")
    parser.add_argument("--every-s", type=float, default=3.0, help="between two faults")
    parser.add_argument("--end-s", type=float, default=720.0, help="by when all have ended")
    parser.add_argument("--lease-s", type=float, default=LEASE_S)
    parser.add_argument("--reruns", type=int, default=3, help="workers killed, one after the other")
    found = run(**vars(parser.parse_args()))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
