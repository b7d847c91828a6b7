"""service.jobs: every job ends once, whoever asks, works, falls silent or comes back; over random
histories in test_jobs_histories.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.job import JobConflict, JobsFull, Request
from service.jobs import CANCEL_S, MAX_ATTEMPTS, RING_AGAIN_S, RING_TOGETHER, Jobs
from tests.service.requested_jobs import LEASE_S, REQUEST, Clock, status, submitted


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(tmp_path: Path, clock: Clock) -> Iterator[Jobs]:
    opened = Jobs(tmp_path, lease_s=LEASE_S, clock=clock)
    yield opened
    opened.close()


def test_job__is_leased_once_and_ends_with_its_report(jobs: Jobs, clock: Clock) -> None:
    job, is_new = jobs.submit(REQUEST)
    assert (is_new, job.status, job.request, job.started_at) == (True, "queued", REQUEST, None)
    clock.now += 5
    lease = jobs.lease(job.id, "a")
    assert lease is not None
    assert jobs.lease(job.id, "b") is None
    assert jobs.beat(job.id, lease.fence, {"stage": "x", "done": 1, "total": 2}) == (True, False)
    running = jobs.get(job.id)
    assert running is not None
    assert (running.status, running.progress) == ("running", {"stage": "x", "done": 1, "total": 2})
    assert jobs.report(job.id) is None
    assert jobs.succeed(job.id, lease.fence, b'{"top1": 1}', b"<p>")
    assert jobs.report(job.id) == ({"top1": 1}, b"<p>")
    ended = jobs.get(job.id)
    assert ended is not None
    assert (ended.status, ended.finished_at) == ("succeeded", clock.now)
    assert ended.started_at == ended.created_at + 5
    assert jobs.lease(job.id, "b") is None  # rung for once more
    assert not jobs.fail(job.id, lease.fence, {"code": "late", "message": ""})
    assert status(jobs, job.id) == ("succeeded", 1)


def test_lease__that_expires_goes_to_another_and_its_fence_is_worth_nothing(
    jobs: Jobs, clock: Clock
) -> None:
    job_id = submitted(jobs)
    first = jobs.lease(job_id, "a")
    assert first is not None
    clock.now += LEASE_S
    assert jobs.sweep().expired == 0  # not yet
    clock.now += 1
    swept = jobs.sweep()
    assert (swept.expired, swept.ring) == (1, [(job_id, "cpu")])
    second = jobs.lease(job_id, "b")
    assert second is not None
    assert second.fence == first.fence + 1
    assert not jobs.beat(job_id, first.fence).held
    for late in (
        lambda: jobs.succeed(job_id, first.fence, b"{}", b""),
        lambda: jobs.fail(job_id, first.fence, {"code": "x", "message": ""}),
        lambda: jobs.crashed(job_id, first.fence, {"code": "x", "message": ""}),
        lambda: jobs.give_back(job_id, first.fence),
        lambda: jobs.cancelled(job_id, first.fence),
    ):
        assert not late()
        assert status(jobs, job_id) == ("running", 2)
    assert jobs.report(job_id) is None
    assert jobs.succeed(job_id, second.fence, b"{}", b"")


def test_worker__that_falls_silent_each_time_leaves_the_job_lost(jobs: Jobs, clock: Clock) -> None:
    job_id = submitted(jobs)
    for _ in range(MAX_ATTEMPTS):
        assert jobs.lease(job_id, "unlucky") is not None
        clock.now += LEASE_S + 1
        assert jobs.sweep().expired == 1
    job = jobs.get(job_id)
    assert job is not None
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("lost", "worker_lost")
    assert "unlucky" in job.error["message"]


def test_crash__is_tried_again_and_fails_with_its_cause(jobs: Jobs) -> None:
    job_id = submitted(jobs)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        lease = jobs.lease(job_id, "a")
        assert lease is not None
        error = {"code": "killed", "message": f"attempt {attempt}", "log": "..."}
        assert jobs.crashed(job_id, lease.fence, error)
    job = jobs.get(job_id)
    assert job is not None
    assert (job.status, job.attempts, job.error) == ("failed", MAX_ATTEMPTS, error)


def test_giving_back__is_no_attempt(jobs: Jobs) -> None:
    job_id = submitted(jobs)
    for _ in range(MAX_ATTEMPTS + 2):
        lease = jobs.lease(job_id, "a")
        assert lease is not None
        assert jobs.give_back(job_id, lease.fence)
        assert jobs.sweep().ring == [(job_id, "cpu")]  # at once
    assert status(jobs, job_id) == ("queued", 0)


def test_rings__do_not_pile_up_while_everybody_is_busy(jobs: Jobs, clock: Clock) -> None:
    ids = [submitted(jobs) for _ in range(RING_TOGETHER + 3)]
    rung = []
    for _ in range(2):
        clock.now += RING_AGAIN_S
        rung.append([job_id for job_id, _ in jobs.sweep().ring])
    assert rung[0] == ids[:RING_TOGETHER]
    assert rung[1][:3] == ids[RING_TOGETHER:]  # in turn: none is left out for ever
    assert jobs.next_queued(["cpu"]) == (ids[0], "cpu")
    jobs.lease(ids[0], "w")
    assert jobs.next_queued(["cpu", "gpu"]) == (ids[1], "cpu")
    assert jobs.next_queued(["gpu"]) is None


def test_cancel__in_every_state(jobs: Jobs, clock: Clock) -> None:
    queued, running, silent, done = (submitted(jobs) for _ in range(4))
    assert jobs.cancel("nobody") is None
    cancelled = jobs.cancel(queued)
    assert cancelled is not None
    assert cancelled.status == "cancelled"
    assert jobs.lease(queued, "a") is None
    leases = {job_id: jobs.lease(job_id, "a") for job_id in (running, silent, done)}
    assert jobs.succeed(done, leases[done].fence, b"{}", b"")  # type: ignore[union-attr]
    for job_id in (running, silent):
        jobs.cancel(job_id)
        assert status(jobs, job_id)[0] == "running"
    fence = leases[running].fence  # type: ignore[union-attr]
    assert jobs.beat(running, fence) == (True, True)
    assert jobs.cancelled(running, fence)
    clock.now += LEASE_S + 1
    jobs.sweep()
    still_done = jobs.cancel(done)
    assert still_done is not None
    assert still_done.status == "succeeded"
    assert {status(jobs, job_id)[0] for job_id in (queued, running, silent)} == {"cancelled"}
    assert all(jobs.get(job_id).finished_at for job_id in (queued, running, silent))  # type: ignore[union-attr]


def test_cancel__ends_soon_although_the_worker_is_dead(jobs: Jobs, clock: Clock) -> None:
    job_id = submitted(jobs)
    lease = jobs.lease(job_id, "dead")
    assert lease is not None
    assert jobs.sweep().again_s is None
    clock.now += 1
    jobs.cancel(job_id)
    assert jobs.sweep().again_s == CANCEL_S
    clock.now += 2
    jobs.cancel(job_id)  # asking twice gives no longer
    assert jobs.beat(job_id, lease.fence) == (True, True)  # nor does saying that one has heard
    clock.now += CANCEL_S - 2
    assert jobs.sweep()[1:] == (0, 0.0)
    clock.now += 0.1
    assert jobs.sweep()[1:] == (1, None)
    assert status(jobs, job_id) == ("cancelled", 1)
    assert not jobs.beat(job_id, lease.fence).held
    assert not jobs.succeed(job_id, lease.fence, b"{}", b"")  # it was not dead after all
    assert (status(jobs, job_id)[0], jobs.report(job_id)) == ("cancelled", None)


def test_cancel__leaves_a_lease_that_ends_sooner_as_it_is(jobs: Jobs, clock: Clock) -> None:
    job_id = submitted(jobs)
    assert jobs.lease(job_id, "a") is not None
    clock.now += LEASE_S - 1
    jobs.cancel(job_id)
    assert jobs.sweep().again_s == 1


@pytest.mark.parametrize("end", ["crashed", "give_back"])
def test_cancel__of_what_would_be_tried_again_ends_it(jobs: Jobs, end: str) -> None:
    job_id = submitted(jobs)
    lease = jobs.lease(job_id, "a")
    assert lease is not None
    jobs.cancel(job_id)
    if end == "crashed":
        assert jobs.crashed(job_id, lease.fence, {"code": "killed", "message": ""})
    else:
        assert jobs.give_back(job_id, lease.fence)
    assert status(jobs, job_id)[0] == "cancelled"


def test_key__gives_the_same_job_and_refuses_another_request(jobs: Jobs) -> None:
    first, _ = jobs.submit(REQUEST, key="k")
    again, is_new = jobs.submit(REQUEST, key="k")
    assert (again.id, is_new) == (first.id, False)
    other = Request("knn", "birds", {"k": [1]}, 0, "m" * 64, "cpu")
    with pytest.raises(JobConflict):
        jobs.submit(other, key="k")
    assert jobs.submit(other)[1]


def test_sweep__rings_again_for_what_nobody_took(jobs: Jobs, clock: Clock) -> None:
    job_id = submitted(jobs)
    assert jobs.sweep().ring == []  # it was rung for as it came
    clock.now += RING_AGAIN_S
    assert jobs.sweep().ring == [(job_id, "cpu")]
    assert jobs.sweep().ring == []
    assert jobs.oldest_queued_s("cpu") == RING_AGAIN_S
    assert jobs.oldest_queued_s("gpu") == 0


def test_list__pages_from_the_newest(jobs: Jobs) -> None:
    ids = [submitted(jobs) for _ in range(5)]
    jobs.cancel(ids[1])
    first = jobs.list(limit=3)
    assert [job.id for job in first] == ids[:1:-1]
    assert [job.id for job in jobs.list(before=first[-1].seq)] == ids[1::-1]
    assert [job.id for job in jobs.list(status="cancelled")] == [ids[1]]
    assert jobs.counts()["queued"] == 4


def test_pending__are_bounded(jobs: Jobs) -> None:
    first = jobs.submit(REQUEST, key="k", pending_limit=1)[0]
    with pytest.raises(JobsFull):
        jobs.submit(REQUEST, pending_limit=1)
    assert jobs.submit(REQUEST, key="k", pending_limit=1)[0].id == first.id
    jobs.cancel(first.id)
    assert jobs.submit(REQUEST, pending_limit=1)[1]


def test_workers__are_seen_for_a_while(jobs: Jobs, clock: Clock) -> None:
    assert jobs.served() == {"cpu": False, "gpu": False}
    jobs.seen("a", ["cpu"])
    jobs.seen("b", ["cpu", "gpu"])
    assert jobs.served() == {"cpu": True, "gpu": True}
    jobs.gone("b")
    assert jobs.served() == {"cpu": True, "gpu": False}
    clock.now += 121
    assert jobs.served() == {"cpu": False, "gpu": False}


def test_two_openings__see_each_others_jobs(jobs: Jobs, tmp_path: Path, clock: Clock) -> None:
    other = Jobs(tmp_path, lease_s=LEASE_S, clock=clock)
    job_id = submitted(jobs)
    assert other.lease(job_id, "there") is not None
    assert jobs.lease(job_id, "here") is None
    other.close()


def test_postgresql__keeps_them_too(new_database: Callable[[], str], tmp_path: Path) -> None:
    url = new_database()
    jobs, other = Jobs(tmp_path, url), Jobs(tmp_path, url)
    job, is_new = jobs.submit(REQUEST, key="k")
    assert is_new
    assert other.submit(REQUEST, key="k") == (job, False)
    without_key = [jobs.submit(REQUEST) for _ in range(2)]
    assert len({each.id for each, is_new in without_key if is_new}) == 2
    for each, _ in without_key:
        jobs.cancel(each.id)
    lease = other.lease(job.id, "there")
    assert lease is not None
    assert jobs.lease(job.id, "here") is None
    assert jobs.beat(job.id, lease.fence, {"stage": "x", "done": 0, "total": 1}).held
    assert jobs.sweep().expired == 0
    jobs.seen("a", ["cpu"])
    jobs.seen("a", ["gpu"])
    assert jobs.served() == {"cpu": False, "gpu": True}
    cancelled = jobs.submit(REQUEST)[0]
    assert other.lease(cancelled.id, "dead") is not None
    jobs.cancel(cancelled.id)
    again_s = jobs.sweep().again_s
    assert again_s is not None
    assert 0 < again_s <= CANCEL_S
    assert other.succeed(job.id, lease.fence, b'{"a": 1}', b"<p>")
    assert jobs.report(job.id) == ({"a": 1}, b"<p>")
    assert jobs.counts()["succeeded"] == 1
    short = Jobs(tmp_path, url, lease_s=-1)
    lost = short.submit(REQUEST)[0]
    assert short.lease(lost.id, "silent") is not None
    assert (short.sweep().expired, short.sweep().expired) == (1, 0)
    for each in (jobs, other, short):
        each.close()
    assert not (tmp_path / "evaluations.sqlite3").exists()
