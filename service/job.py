"""One evaluation job, as it is asked for and as it stands, and what its workers are told.

Plain values, for those who ask, work and ring; what happens to a job is decided in service.jobs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

CPU, GPU = QUEUES = "cpu", "gpu"
QUEUED, RUNNING = "queued", "running"
SUCCEEDED, FAILED, CANCELLED, LOST = ENDED = "succeeded", "failed", "cancelled", "lost"
STATES = (QUEUED, RUNNING, *ENDED)


class JobConflict(Exception):
    """The idempotency key was used for another request."""


class JobsFull(Exception):
    """As many jobs as `limit` are queued or running."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} evaluations are queued or running")
        self.limit = limit


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    protocol: str
    dataset: str
    settings: Mapping[str, Any]
    seed: int
    model: str  # model_id of the bundle that is to be evaluated
    queue: str

    def digest(self) -> str:
        """sha256 (hex) of it."""
        values = [self.protocol, self.dataset, self.settings, self.seed, self.model, self.queue]
        return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True)
class Job:
    """One job as it stands. Times are seconds since 1970, None where it is not that far."""

    id: str
    seq: int  # grows with each job
    request: Request
    status: str
    attempts: int
    fence: int
    progress: Mapping[str, Any] | None
    error: Mapping[str, Any] | None  # code, message, log (its last lines)
    created_at: float
    started_at: float | None
    finished_at: float | None

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return self.status in ENDED


class Lease(NamedTuple):
    """A job that is held by a worker."""

    job: Job
    fence: int


class Beat(NamedTuple):
    """What a worker is told when it renews its lease."""

    held: bool  # False: the job is somebody else's, or has ended
    cancel: bool  # it is to be cancelled


class Swept(NamedTuple):
    """What a sweep did."""

    ring: Sequence[tuple[str, str]]  # (id, queue) of jobs to ring for
    expired: int  # leases
    # When the next job that is being cancelled must have ended; None: none is.
    again_s: float | None
