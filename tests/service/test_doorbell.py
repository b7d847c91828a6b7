"""service.doorbell: a broker that refuses or is away is said; the table is swept all the same."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service import jobs as module
from service.datasets import open_registry
from service.doorbell import Doorbell, celery_application, refusal
from service.evaluations import Evaluations
from service.job import Swept
from service.metrics import Metrics
from service.settings import Settings
from tests.faults.brokers import Redis, RefusingAmqp
from tests.service.requested_jobs import REQUEST

WAIT_S = 60


@pytest.fixture
def refusing() -> Iterator[RefusingAmqp]:
    server = RefusingAmqp()
    yield server
    server.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path / "redis", password="right")
    yield server
    server.close()


def test_refusal__is_none_where_the_broker_lets_us_in_or_is_away(
    tmp_path: Path, redis: Redis
) -> None:
    away = redis.url.replace(str(redis.port), "1")
    for url in (redis.url, away, None):
        assert refusal(celery_application(tmp_path, url, limit_s=60)) is None


def test_ring__is_false_where_the_broker_refuses_or_is_away(
    tmp_path: Path, redis: Redis, refusing: RefusingAmqp
) -> None:
    away = "amqp://guest:key@127.0.0.1:1//"
    for url in (redis.url.replace("right", "wrong"), refusing.url, away):
        doorbell = Doorbell(celery_application(tmp_path, url, limit_s=60))
        with capture_logs() as logs:
            assert not doorbell.ring("a" * 32, "cpu")
        assert [entry["event"] for entry in logs] == ["broker_unreachable"]
        assert "key" not in str(logs)


def test_evaluations__are_swept_again_and_again_while_the_broker_refuses(
    tmp_path: Path, refusing: RefusingAmqp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RING_AGAIN_S", 0.0)
    settings = Settings(
        bundle=tmp_path / "bundle", state=tmp_path, broker=refusing.url, evaluation_lease_s=1
    )
    with capture_logs() as logs:
        evaluations = Evaluations(settings, open_registry(None), Metrics())
        try:
            evaluations.jobs.submit(REQUEST)
            give_up = time.monotonic() + WAIT_S
            while refusing.asked < 6:  # by the look at the start, and at least twice by sweeps
                assert time.monotonic() < give_up, "nobody sweeps any more"
                time.sleep(0.01)
        finally:
            evaluations.close()
    (said,) = [entry for entry in logs if entry["event"] == "broker_refused"]
    assert said["log_level"] == "error"
    assert "refuses the connection" in said["reason"]
    assert "key" not in str(logs)


def test_evaluations__are_swept_again_after_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, calls, again = module.Jobs.sweep, [0], threading.Event()

    def failing(jobs: module.Jobs) -> Swept:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("a defect")
        again.set()
        return sweep(jobs)

    monkeypatch.setattr(module.Jobs, "sweep", failing)
    settings = Settings(bundle=tmp_path / "bundle", state=tmp_path, evaluation_lease_s=1)
    with capture_logs() as logs:
        evaluations = Evaluations(settings, open_registry(None), Metrics())
        try:
            assert again.wait(WAIT_S)
        finally:
            evaluations.close()
    (said,) = [entry for entry in logs if entry["event"] == "sweep_failed"]
    assert str(said["exc_info"]) == "a defect"
