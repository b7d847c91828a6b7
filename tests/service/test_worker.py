"""service.worker: a start that cannot be says why; poison costs itself alone; a worker that hears
nothing ends, to begin anew."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.doorbell import Doorbell, celery_application
from service.job import CPU, GPU, Request, Swept
from service.jobs import MAX_ATTEMPTS, Jobs
from service.settings import Settings
from service.worker import STUCK_EXIT, Worker
from tests.faults.brokers import Redis
from tests.service.conftest import build_bundle
from trainer.representation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_evaluate.py")
WAIT_S = 120


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "datasets.yaml").write_text("set: {kind: folder, root: nowhere}\n")
    return Settings(
        bundle=build_bundle(tmp_path / "bundle"),
        state=tmp_path / "state",
        datasets=tmp_path / "datasets.yaml",
    )


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    settings.state.mkdir()
    opened = Jobs(settings.state)
    yield opened
    opened.close()


def submitted(jobs: Jobs, settings: Settings, **asked: Any) -> str:
    model = open_bundle(settings.bundle).model_id
    return jobs.submit(Request("knn", "set", asked, 0, model, CPU))[0].id


def start_worker(settings: Settings, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tests.faults.fake_worker", "worker", "-Q", CPU,
         "--loglevel", "warning", "--without-gossip", "--without-mingle"],
        cwd=ROOT, env={**os.environ, **settings.environment(), **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    started = Redis(tmp_path_factory.mktemp("redis") / "data", password="right")
    yield started
    started.close()


def end_of_start(settings: Settings, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a worker that is not to come up."""
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "service.worker", "worker", "-Q", CPU],
        cwd=ROOT, env={**os.environ, **settings.environment(), **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ended.stderr
    return ended.returncode, "\n".join(told)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "EVALUATION_LEASE_S",
            "soon",
            "--evaluation-lease-s (INVPROP_EVALUATION_LEASE_S) = 'soon': ",
        ),
        ("BROKER", "mqtt://u:key@host", "the broker's URL begins with mqtt://; wanted redis://"),
        ("STATE", "/proc/none", "the state directory /proc/none cannot be used: "),
        ("DATABASE", "mysql://u:key@host/db", "wanted postgresql://"),
        ("DATABASE", "postgresql://u:key@127.0.0.1:1/db", "INVPROP_DATABASE says where they are"),
    ],
)
def test_start__that_cannot_be_ends_with_one_line(
    settings: Settings, variable: str, value: str, told: str
) -> None:
    code, said = end_of_start(settings, **{f"INVPROP_{variable}": value})
    assert code == 1
    assert told in said
    assert "\n" not in said
    assert "key" not in said


@pytest.mark.parametrize("password", ["wrong", ""])
def test_start__that_the_broker_refuses_ends_with_one_line(
    settings: Settings, redis: Redis, password: str
) -> None:
    url = redis.url.replace("right", password)
    code, said = end_of_start(settings, INVPROP_BROKER=url)
    assert code == 1
    assert re.fullmatch(
        rf"error: the broker redis://(:\*\*@)?127.0.0.1:{redis.port}/0 refuses the connection: "
        r".*; INVPROP_BROKER has to give user and password",
        said,
    )


def test_worker__goes_on_sweeping_after_a_defect(
    jobs: Jobs, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, calls, again = Jobs.sweep, [0], threading.Event()

    def failing(table: Jobs) -> Swept:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("a defect")
        again.set()
        return sweep(table)

    monkeypatch.setattr(Jobs, "sweep", failing)
    application = celery_application(settings.state, None, limit_s=60)
    worker = Worker(settings, application, sweep_s=0.05)
    with capture_logs() as logs:
        worker.begin([CPU])
        try:
            assert again.wait(WAIT_S)
        finally:
            worker.end()
    assert [str(e["exc_info"]) for e in logs if e["event"] == "sweep_failed"] == ["a defect"]


def test_watchdog__ends_a_worker_that_is_connected_and_hears_nothing(
    jobs: Jobs, settings: Settings
) -> None:
    job_id = submitted(jobs, settings)
    application = celery_application(settings.state, None, limit_s=60)
    assert Doorbell(application).ring(job_id, CPU)
    deaf = start_worker(settings, FAKE_DEAF="1", FAKE_STUCK_S="0.5", FAKE_SWEEP_S="0.2")
    try:
        assert deaf.wait(WAIT_S) == STUCK_EXIT
    finally:
        deaf.kill()
    found = jobs.get(job_id)
    assert found is not None
    assert (found.status, found.attempts) == ("queued", 0)  # its message lay there all the time
    again = start_worker(settings)
    try:
        while not (found := jobs.get(job_id)).ended:  # type: ignore[union-attr]
            assert again.poll() is None
    finally:
        again.terminate()
        assert again.wait(WAIT_S) == 0
    assert found is not None
    assert (found.status, found.attempts) == ("succeeded", 1)


def test_poison__ends_with_its_cause_and_leaves_the_others_untouched(
    jobs: Jobs, settings: Settings, tmp_path: Path
) -> None:
    limits = {"evaluation_timeout_s": 2, "evaluation_memory_bytes": 2**30}
    settings = settings.model_copy(update=limits)
    poison = {
        "segfault": submitted(jobs, settings, do="segfault"),
        "memory": submitted(jobs, settings, do="memory"),
        "endless": submitted(jobs, settings, do="hang", ready=str(tmp_path / "ready")),
    }
    others = [submitted(jobs, settings) for _ in range(3)]
    application = celery_application(settings.state, None, limit_s=60)
    assert Doorbell(application).ring(poison["segfault"], CPU)  # who works rings for the next
    worker = start_worker(settings)
    try:
        while jobs.counts()["queued"] or jobs.counts()["running"]:
            assert worker.poll() is None
            threading.Event().wait(0.05)
    finally:
        worker.terminate()
        assert worker.wait(WAIT_S) == 0
    found = {job.id: job for job in jobs.list()}
    assert {found[job_id].status for job_id in others} == {"succeeded"}
    assert {found[job_id].attempts for job_id in others} == {1}
    ended = {name: found[job_id] for name, job_id in poison.items()}
    assert {job.status for job in ended.values()} == {"failed"}
    assert {name: job.attempts for name, job in ended.items()} == {
        "segfault": MAX_ATTEMPTS,
        "memory": MAX_ATTEMPTS,
        "endless": 1,
    }
    errors = {name: job.error or {} for name, job in ended.items()}
    assert "SIGSEGV" in errors["segfault"]["message"]
    assert "MemoryError" in errors["memory"]["log"]
    assert errors["endless"]["code"] == "time_limit"


def test_watchdog__leaves_a_worker_alone_that_has_nothing_to_do(
    jobs: Jobs, settings: Settings
) -> None:
    application = celery_application(settings.state, None, limit_s=60)
    worker = Worker(settings, application, stuck_s=0)
    assert not worker.is_stuck([CPU])
    job_id = submitted(jobs, settings)
    assert worker.is_stuck([CPU])
    assert not worker.is_stuck([GPU])  # others are there for it
    assert not Worker(settings, application, stuck_s=WAIT_S).is_stuck([CPU])  # it may yet come
    assert jobs.lease(job_id, "another") is not None
    assert not worker.is_stuck([CPU])
    worker.jobs.close()


def test_watchdog__leaves_a_worker_alone_that_is_at_work(
    jobs: Jobs, settings: Settings, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    job_id = submitted(jobs, settings, do="hang", ready=str(ready))
    submitted(jobs, settings)
    worker = Worker(
        settings,
        celery_application(settings.state, None, limit_s=60),
        command=(sys.executable, str(FAKE)),
        stuck_s=0,
    )
    working = threading.Thread(target=worker.evaluate, args=(job_id,))
    working.start()
    while not ready.exists():
        threading.Event().wait(0.02)
    assert not worker.is_stuck([CPU])
    jobs.cancel(job_id)
    working.join()
    assert worker.is_stuck([CPU])
    worker.jobs.close()
