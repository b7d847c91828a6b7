"""service.jobs: every job ends once, over random histories of callers, workers and clocks."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from service.job import ENDED
from service.jobs import MAX_ATTEMPTS, Jobs
from tests.service.requested_jobs import LEASE_S, Clock, status, submitted

SHM = Path("/dev/shm")


class JobsMachine(RuleBasedStateMachine):
    """Random callers, workers and clocks against what may be said of a job."""

    number = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.leases: list[tuple[str, int]] = []
        self.ended: dict[str, tuple[str, Any]] = {}
        self.ids: list[str] = []

    @initialize()
    def begin(self) -> None:
        place = self.place / str(next(self.number))
        place.mkdir()
        self.jobs = Jobs(place, lease_s=LEASE_S, clock=self.clock)

    place: Path

    @rule()
    def submit(self) -> None:
        self.ids.append(submitted(self.jobs))

    @rule(data=st.data(), worker=st.sampled_from("abc"))
    def ring(self, data: st.DataObject, worker: str) -> None:
        if self.ids:
            job_id = data.draw(st.sampled_from(self.ids))
            lease = self.jobs.lease(job_id, worker)
            if lease is not None:
                assert all(f < lease.fence for j, f in self.leases if j == job_id)
                self.leases.append((job_id, lease.fence))

    @rule(
        data=st.data(),
        what=st.sampled_from(["beat", "succeed", "fail", "crashed", "give_back", "cancelled"]),
    )
    def say(self, data: st.DataObject, what: str) -> None:
        if not self.leases:
            return
        job_id, fence = data.draw(st.sampled_from(self.leases))
        before = self.jobs.get(job_id)
        assert before is not None
        error = {"code": "x", "message": str(fence)}
        more = {"succeed": (b"{}", b""), "fail": (error,), "crashed": (error,)}.get(what, ())
        took = getattr(self.jobs, what)(job_id, fence, *more)
        current = before.status == "running" and before.fence == fence
        assert bool(took.held if what == "beat" else took) == current

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.ids:
            self.jobs.cancel(data.draw(st.sampled_from(self.ids)))

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        ring = dict(self.jobs.sweep().ring)
        assert all(status(self.jobs, job_id)[0] == "queued" for job_id in ring)

    @invariant()
    def what_has_ended_stays(self) -> None:
        for job_id in self.ids:
            job = self.jobs.get(job_id)
            assert job is not None
            assert 0 <= job.attempts <= MAX_ATTEMPTS
            report = self.jobs.report(job_id)
            assert (report is not None) == (job.status == "succeeded")
            if job.status in ENDED:
                assert job.finished_at is not None
                seen = (job.status, job.error)
                assert self.ended.setdefault(job_id, seen) == seen
            else:
                assert job_id not in self.ended

    def teardown(self) -> None:
        self.jobs.close()


@pytest.mark.parametrize(
    ("examples", "steps"), [(15, 25), pytest.param(300, 50, marks=pytest.mark.long)]
)
def test_jobs__end_once_whatever_happens(examples: int, steps: int) -> None:
    # In memory where there is a place: it is not about the disk, and every step writes.
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as place:
        machine = type("Machine", (JobsMachine,), {"place": Path(place)})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
