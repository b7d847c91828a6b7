"""Jobs for the tests of service.jobs: submitted, looked at, and the clock that leases go by."""

from service.job import Request
from service.jobs import Jobs

LEASE_S = 60.0
REQUEST = Request("knn", "flowers", {"k": [1]}, 0, "m" * 64, "cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def status(jobs: Jobs, job_id: str) -> tuple[str, int]:
    job = jobs.get(job_id)
    assert job is not None
    return job.status, job.attempts


def submitted(jobs: Jobs) -> str:
    return jobs.submit(REQUEST)[0].id
