"""Rows of the evaluations: made, read as jobs, and changed only by who holds them.

In: requests, rows, and connections with their transaction. Out: rows, jobs, and whether a fence was
the present one: with an older one nothing changes.
"""

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
import sqlalchemy as sa

from service.job import CANCELLED, QUEUED, RUNNING, Job, Request
from service.jobs_tables import evaluations


def job_of(row: Any) -> Job:
    """The job of a row of the table."""

    def parsed(text: str | None) -> Any:
        return None if text is None else orjson.loads(text)

    request = Request(
        row.protocol, row.dataset, orjson.loads(row.settings), row.seed, row.model, row.queue
    )
    return Job(
        row.id,
        row.seq,
        request,
        row.status,
        row.attempts,
        row.fence,
        parsed(row.progress),
        parsed(row.error),
        row.created_at,
        row.started_at,
        row.finished_at,
    )


def new_row(request: Request, *, key: str | None, digest: str, now: float) -> dict[str, Any]:
    """The row of a job that nobody has held yet, with an id of its own."""
    return {
        "id": uuid.uuid4().hex,
        "idempotency_key": key,
        "digest": digest,
        "protocol": request.protocol,
        "dataset": request.dataset,
        "settings": orjson.dumps(request.settings).decode(),
        "seed": request.seed,
        "model": request.model,
        "queue": request.queue,
        "status": QUEUED,
        "attempts": 0,
        "fence": 0,
        "cancel": 0,
        "rung_at": now,
        "queued_since": now,
        "created_at": now,
    }


def row_of(job_id: str) -> sa.Select[Any]:
    """Reads the row of a job."""
    return sa.select(evaluations).where(evaluations.c.id == job_id)


def leased(job_id: str, fence: int) -> sa.Update:
    """Changes a job that runs under that fence, and no other."""
    mine = (evaluations.c.id == job_id, evaluations.c.fence == fence)
    return sa.update(evaluations).where(*mine, evaluations.c.status == RUNNING)


def end(
    connection: sa.Connection,
    job_id: str,
    fence: int,
    status: str,
    *,
    now: float,
    error: Mapping[str, Any] | None = None,
) -> bool:
    """End a job; False where the fence is an old one."""
    values = {
        "status": status,
        "error": None if error is None else orjson.dumps(error).decode(),
        "finished_at": now,
        "lease_until": None,
    }
    return connection.execute(leased(job_id, fence).values(values)).rowcount == 1


def requeue(
    connection: sa.Connection,
    job_id: str,
    fence: int,
    *,
    now: float,
    attempts: int,
    error: Mapping[str, Any] | None = None,
) -> bool:
    """Back into the queue, to be rung for at the next sweep; cancelled where that was asked."""
    values = {
        "status": sa.case((evaluations.c.cancel == 1, CANCELLED), else_=QUEUED),
        "finished_at": sa.case((evaluations.c.cancel == 1, now)),
        "attempts": attempts,
        "error": None if error is None else orjson.dumps(error).decode(),
        "lease_until": None,
        "rung_at": 0.0,
        "queued_since": now,
        "progress": None,
    }
    return connection.execute(leased(job_id, fence).values(values)).rowcount == 1
