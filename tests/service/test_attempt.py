"""service.attempt: whatever a child does, its job ends, with the cause, and nothing is left."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from service import attempt as attempt_module
from service.attempt import JobRefused, Limits, attempt
from service.gallery.protocol import StorageError
from service.job import Job, Lease, Request
from service.jobs import MAX_ATTEMPTS, Jobs

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_evaluate.py")))
ROOT = Path(__file__).parents[2]
WAIT_S = 30
LIMITS = Limits(WAIT_S)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    opened = Jobs(tmp_path, lease_s=4)
    yield opened
    opened.close()


@pytest.fixture
def run(jobs: Jobs, tmp_path: Path) -> Callable[..., tuple[str, Job]]:
    """Submit a job with these settings and work on it once."""

    def one(
        limits: Limits = LIMITS,
        stopping: Callable[[], bool] = lambda: False,
        job_id: str | None = None,
        describe: Callable[[Lease], Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> tuple[str, Job]:
        if job_id is None:
            job_id = jobs.submit(Request("knn", "d", settings, 7, "m", "cpu"))[0].id
        lease = jobs.lease(job_id, "here")
        assert lease is not None
        directory = tmp_path / "work" / str(lease.fence)
        outcome = attempt(
            jobs,
            lease,
            describe=describe
            or (lambda lease: {"settings": lease.job.request.settings, "seed": 7}),
            directory=directory,
            limits=limits,
            stopping=stopping,
            command=COMMAND,
        )
        assert not directory.exists()
        job = jobs.get(job_id)
        assert job is not None
        return outcome, job

    return one


def alive(pids: Path) -> list[int]:
    found = [int(pid) for pid in pids.read_text().split()]
    assert found
    return [p for p in found if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def test_child__that_ends_well_leaves_its_report(run: Any, jobs: Jobs) -> None:
    outcome, job = run()
    assert (outcome, job.status, job.attempts) == ("succeeded", "succeeded", 1)
    found = jobs.report(job.id)
    assert found is not None
    assert (found[0]["seed"], found[1]) == (7, b"<p>fine</p>")


def test_child__that_says_what_is_wrong_is_not_tried_again(run: Any) -> None:
    outcome, job = run(do="refuse")
    assert (outcome, job.status) == ("failed", "failed")
    assert job.error == {
        "code": "dataset_invalid",
        "message": "one class only",
        "log": job.error["log"],
    }
    assert "what people may want to read" in job.error["log"]
    assert "a line that is no JSON" in job.error["log"]


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"do": "segfault"}, "killed", "SIGSEGV"),
        ({"do": "memory"}, "crashed", "exit code 1"),
    ],
)
def test_poison__fails_with_its_cause_after_three_attempts(
    run: Any, settings: Any, code: str, message: str
) -> None:
    limits = Limits(WAIT_S, memory_bytes=2**30)
    outcome, job = run(limits, **settings)
    for _ in range(MAX_ATTEMPTS - 1):
        assert (outcome, job.status) == ("crashed", "queued")
        outcome, job = run(limits, job_id=job.id)
    assert (job.status, job.error["code"]) == ("failed", code)
    assert message in job.error["message"]
    if code == "crashed":
        assert "MemoryError" in job.error["log"]


def test_child__without_a_report_has_failed(run: Any) -> None:
    outcome, job = run(do="no report")
    assert (outcome, job.error["code"]) == ("failed", "report_unreadable")


def test_grandchild__does_not_outlive_the_attempt(run: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    run(do="grandchild", pids=str(pids))
    assert len(pids.read_text().split()) == 2
    assert alive(pids) == []


@pytest.mark.parametrize("do", ["hang", "stubborn"])
def test_endless__is_killed_at_its_limit(
    run: Any, tmp_path: Path, do: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attempt_module, "_GRACE_S", 0.2)
    pids, ready = tmp_path / "pids", tmp_path / "ready"
    outcome, job = run(Limits(1.5), do=do, pids=str(pids), ready=str(ready))
    assert (outcome, job.status, job.error["code"]) == ("failed", "failed", "time_limit")
    assert "1.5 s that `evaluation_timeout_s` allows" in job.error["message"]
    assert alive(pids) == []


def _once_ready(ready: Path, act: Callable[[], Any]) -> None:
    def wait() -> None:
        while not ready.exists():
            threading.Event().wait(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_cancel__ends_the_child(run: Any, jobs: Jobs, tmp_path: Path) -> None:
    pids, ready = tmp_path / "pids", tmp_path / "ready"
    _once_ready(ready, lambda: jobs.cancel(jobs.list()[0].id))
    outcome, job = run(do="hang", pids=str(pids), ready=str(ready))
    assert (outcome, job.status) == ("cancelled", "cancelled")
    assert alive(pids) == []


def test_worker__that_stops_gives_the_job_back(run: Any, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    outcome, job = run(stopping=ready.exists, do="hang", ready=str(ready))
    assert (outcome, job.status, job.attempts) == ("given_back", "queued", 0)


def test_child__that_was_signalled_is_tried_again(run: Any, monkeypatch: Any) -> None:
    outcome, job = run(do="interrupted")
    assert (outcome, job.status, job.attempts) == ("crashed", "queued", 1)
    assert (job.error["code"], "SIGTERM" in job.error["message"]) == ("interrupted", True)

    def until_it_ends(jobs: Jobs, lease: Lease, child: Any, *_: Any) -> None:
        while child.code() is None:
            threading.Event().wait(0.02)

    # Its worker was signalled, too, and is slower to notice than the child to end.
    monkeypatch.setattr(attempt_module, "_watch", until_it_ends)
    outcome, job = run(stopping=lambda: True, job_id=job.id)
    assert (outcome, job.status, job.attempts) == ("given_back", "queued", 1)


def test_lease__that_went_to_another_ends_the_child_without_a_word(
    run: Any, jobs: Jobs, tmp_path: Path
) -> None:
    pids, ready = tmp_path / "pids", tmp_path / "ready"

    def take_over() -> None:
        job = jobs.list()[0]
        assert jobs.give_back(job.id, job.fence)
        assert jobs.lease(job.id, "another") is not None

    _once_ready(ready, take_over)
    outcome, job = run(do="hang", pids=str(pids), ready=str(ready))
    assert (outcome, job.status, job.fence) == ("lost", "running", 2)
    assert alive(pids) == []


def test_database__that_is_away_ends_the_child_with_the_lease(
    run: Any, jobs: Jobs, tmp_path: Path, monkeypatch: Any
) -> None:
    pids, ready = tmp_path / "pids", tmp_path / "ready"
    jobs.lease_s = 0.5

    def away(*_: Any) -> Any:
        raise StorageError("the database is away", full=False)

    monkeypatch.setattr(jobs, "beat", away)
    outcome, _ = run(do="hang", pids=str(pids), ready=str(ready))
    assert outcome == "lost"
    assert alive(pids) == []


def test_job__that_cannot_be_run_here_fails_by_name(run: Any) -> None:
    def refuse(lease: Lease) -> Mapping[str, Any]:
        raise JobRefused("model_changed", "another bundle")

    outcome, job = run(describe=refuse)
    assert (outcome, job.error) == (
        "failed",
        {"code": "model_changed", "message": "another bundle"},
    )


def test_starter__that_is_killed_takes_all_with_it(tmp_path: Path) -> None:
    """The child and what it has started, although nobody was there to kill them."""
    pids = tmp_path / "pids"
    below = "import time; time.sleep(600)"
    child = (
        "import subprocess, sys, os, time, pathlib;"
        f"below = subprocess.Popen([sys.executable, '-c', {below!r}]);"
        f"pathlib.Path({str(pids)!r} + '.new').write_text(f'{{os.getpid()}} {{below.pid}}');"
        f"os.rename({str(pids)!r} + '.new', {str(pids)!r});"
        "time.sleep(600)"
    )
    starter = (
        "import subprocess, sys;"
        "subprocess.Popen([sys.executable, '-m', 'service.tethered', '0', sys.executable, '-c',"
        f" {child!r}], start_new_session=True).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", starter], cwd=ROOT)
    tick = threading.Event()
    while not pids.exists():
        assert process.poll() is None
        tick.wait(0.02)
    assert len(alive(pids)) == 2
    process.kill()
    process.wait()
    for _ in range(500):
        if not alive(pids):
            break
        tick.wait(0.02)
    assert alive(pids) == []
