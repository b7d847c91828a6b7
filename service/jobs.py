"""Evaluation jobs: the table that owns their state. A message queue only rings for it.

In: what was asked for, and what workers say. Out: jobs, each ended exactly once: with a report,
with an error, or cancelled. A worker holds a job by a lease that it renews; every lease has a fence
number of its own, and what comes with an older one changes nothing. SQLite in the state directory,
or the PostgreSQL of the gallery, whose clock then counts for all hosts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from service.job import (
    CANCELLED,
    FAILED,
    LOST,
    QUEUED,
    QUEUES,
    RUNNING,
    STATES,
    SUCCEEDED,
    Beat,
    Job,
    JobConflict,
    JobsFull,
    Lease,
    Request,
    Swept,
)
from service.jobs_database import JobsDatabase
from service.jobs_rows import end, job_of, leased, new_row, requeue, row_of
from service.jobs_tables import evaluations, reports, workers

MAX_ATTEMPTS = 3
RING_AGAIN_S = 30.0  # a queued job that nobody took is rung for again
# In one sweep: while every worker is busy for hours, messages must not pile up by the thousand.
RING_TOGETHER = 16
# A worker that was told to cancel has so long: it looks every 2 s and gives its child 3 s.
CANCEL_S = 8.0
SWEEP_S = 10.0  # service and workers look that often for leases that ran out
WORKER_SEEN_S = 120.0  # a worker that was not seen for longer is not there
_GONE_S = 7 * 86400.0  # and is forgotten after a week


class Jobs:
    """The table; may be used from any thread and from several processes at a time.

    Args:
        state: the state directory, where SQLite's file is kept.
        url: a postgresql:// URL in place of it.
        lease_s: how long a worker holds a job without renewing its lease.
        clock: seconds since 1970; PostgreSQL's own clock is used in place of it.

    Raises:
        StorageError: the database cannot be reached.
    """

    def __init__(
        self,
        state: Path,
        url: str | None = None,
        *,
        lease_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lease_s = lease_s
        self._database = JobsDatabase(state, url, clock)

    def submit(
        self, request: Request, *, key: str | None = None, pending_limit: int | None = None
    ) -> tuple[Job, bool]:
        """Accept a job; it is on disk when this returns.

        Args:
            key: of a caller who may ask twice for the same.

        Returns:
            the job, and whether it is a new one.

        Raises:
            JobConflict: the key was used for another request.
            JobsFull: `pending_limit` jobs are queued or running.
        """
        digest = request.digest()
        with self._database.transaction() as connection:
            if key is not None:
                row = connection.execute(
                    sa.select(evaluations).where(evaluations.c.idempotency_key == key)
                ).one_or_none()
                if row is not None:
                    return _known(row, digest), False
            if pending_limit is not None:
                pending = evaluations.c.status.in_((QUEUED, RUNNING))
                count = sa.select(sa.func.count()).select_from(evaluations).where(pending)
                if (connection.scalar(count) or 0) >= pending_limit:
                    raise JobsFull(pending_limit)
            values = new_row(request, key=key, digest=digest, now=self._database.now(connection))
            # Two callers of one key at a time: PostgreSQL lets both look before one inserts.
            insert = self._database.insert(evaluations).values(values)
            same = insert.on_conflict_do_nothing(index_elements=["idempotency_key"])
            # Not by rowcount: psycopg has none of an insert that returns its row.
            made = connection.execute(same.returning(evaluations.c.id)).one_or_none()
            inserted = made is not None
            where = (
                evaluations.c.id == values["id"]
                if inserted
                else evaluations.c.idempotency_key == key
            )
            row = connection.execute(sa.select(evaluations).where(where)).one()
            return (job_of(row), True) if inserted else (_known(row, digest), False)

    def get(self, job_id: str) -> Job | None:
        """The job of that id."""
        with self._database.transaction(writes=False) as connection:
            row = connection.execute(row_of(job_id)).one_or_none()
        return None if row is None else job_of(row)

    def report(self, job_id: str) -> tuple[Mapping[str, Any], bytes] | None:
        """The report of a job that succeeded: its values, and the page."""
        with self._database.transaction(writes=False) as connection:
            row = connection.execute(
                sa.select(reports.c.document, reports.c.page).where(reports.c.id == job_id)
            ).one_or_none()
        return None if row is None else (orjson.loads(row.document), bytes(row.page))

    def list(
        self, *, status: str | None = None, before: int | None = None, limit: int = 100
    ) -> Sequence[Job]:
        """The newest first, those with a `seq` below `before`."""
        query = sa.select(evaluations).order_by(evaluations.c.seq.desc()).limit(limit)
        if status is not None:
            query = query.where(evaluations.c.status == status)
        if before is not None:
            query = query.where(evaluations.c.seq < before)
        with self._database.transaction(writes=False) as connection:
            return [job_of(row) for row in connection.execute(query)]

    def lease(self, job_id: str, worker: str) -> Lease | None:
        """Take a job that nobody holds; None where there is none such, however often it is rung."""
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            free = sa.and_(evaluations.c.status == QUEUED, evaluations.c.cancel == 0)
            changed = connection.execute(
                sa.update(evaluations)
                .where(evaluations.c.id == job_id, free)
                .values(
                    status=RUNNING,
                    fence=evaluations.c.fence + 1,
                    attempts=evaluations.c.attempts + 1,
                    lease_until=now + self.lease_s,
                    worker=worker,
                    started_at=sa.func.coalesce(evaluations.c.started_at, now),
                    progress=None,
                )
            )
            if changed.rowcount != 1:
                return None
            job = job_of(connection.execute(row_of(job_id)).one())
        return Lease(job, job.fence)

    def beat(self, job_id: str, fence: int, progress: Mapping[str, Any] | None = None) -> Beat:
        """Renew a lease, with how far the job is; one of a job that is being cancelled runs out."""
        values: dict[str, Any] = {}
        if progress is not None:
            values["progress"] = orjson.dumps(progress).decode()
        with self._database.transaction() as connection:
            renewed = self._database.now(connection) + self.lease_s
            wanted = evaluations.c.cancel == 0
            values["lease_until"] = sa.case((wanted, renewed), else_=evaluations.c.lease_until)
            held = connection.execute(leased(job_id, fence).values(values)).rowcount == 1
            cancel = connection.scalar(
                sa.select(evaluations.c.cancel).where(evaluations.c.id == job_id)
            )
        return Beat(held, bool(cancel))

    def succeed(self, job_id: str, fence: int, document: bytes, page: bytes) -> bool:
        """End a job with its report; False where the fence is an old one, and nothing changes.

        Args:
            document: report.json.
            page: report.html.
        """
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            if not end(connection, job_id, fence, SUCCEEDED, now=now):
                return False
            values = {"id": job_id, "document": document.decode(), "page": page}
            connection.execute(sa.insert(reports).values(values))
        return True

    def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool:
        """End a job with an error; False where the fence is an old one."""
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            return end(connection, job_id, fence, FAILED, now=now, error=error)

    def cancelled(self, job_id: str, fence: int) -> bool:
        """End a job whose worker has stopped it; False where the fence is an old one."""
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            return end(connection, job_id, fence, CANCELLED, now=now)

    def crashed(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool:
        """Give a job whose process died another try, or end it after MAX_ATTEMPTS of them."""
        with self._database.transaction() as connection:
            row = connection.execute(row_of(job_id)).one_or_none()
            if row is None or row.fence != fence or row.status != RUNNING:
                return False
            now = self._database.now(connection)
            if row.attempts >= MAX_ATTEMPTS:
                return end(connection, job_id, fence, FAILED, now=now, error=error)
            tried = row.attempts
            return requeue(connection, job_id, fence, now=now, attempts=tried, error=error)

    def give_back(self, job_id: str, fence: int) -> bool:
        """A worker that stops hands its job on: this was no attempt."""
        with self._database.transaction() as connection:
            row = connection.execute(row_of(job_id)).one_or_none()
            if row is None or row.fence != fence or row.status != RUNNING:
                return False
            now = self._database.now(connection)
            return requeue(connection, job_id, fence, now=now, attempts=row.attempts - 1)

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job: at once where nobody holds it, else its worker is told at its next beat.

        A worker that does not end it within CANCEL_S has lost it: the next sweep ends it, and what
        the worker says later is as late as with any lease that ran out.
        """
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            connection.execute(
                sa.update(evaluations)
                .where(evaluations.c.id == job_id, evaluations.c.status == QUEUED)
                .values(status=CANCELLED, cancel=1, finished_at=now)
            )
            connection.execute(
                sa.update(evaluations)
                .where(
                    evaluations.c.id == job_id,
                    evaluations.c.status == RUNNING,
                    evaluations.c.cancel == 0,
                )
                .values(
                    cancel=1,
                    lease_until=sa.case(
                        (evaluations.c.lease_until < now + CANCEL_S, evaluations.c.lease_until),
                        else_=now + CANCEL_S,
                    ),
                )
            )
            row = connection.execute(row_of(job_id)).one_or_none()
        return None if row is None else job_of(row)

    def sweep(self) -> Swept:
        """Take jobs from workers that fell silent, and say which jobs to ring for (again)."""
        expired, ring = 0, []
        with self._database.transaction() as connection:
            now = self._database.now(connection)
            late = sa.and_(evaluations.c.status == RUNNING, evaluations.c.lease_until < now)
            query = sa.select(evaluations).where(late)
            if self._database.is_postgresql:
                query = query.with_for_update(skip_locked=True)
            for row in connection.execute(query).all():
                expired += 1
                if row.cancel:
                    end(connection, row.id, row.fence, CANCELLED, now=now)
                elif row.attempts >= MAX_ATTEMPTS:
                    message = (
                        f"its worker fell silent in each of {row.attempts} attempts, last "
                        f"{row.worker}: it was killed, or its host is gone. Look there, then ask "
                        "for the evaluation again"
                    )
                    error = {"code": "worker_lost", "message": message}
                    end(connection, row.id, row.fence, LOST, now=now, error=error)
                else:
                    requeue(connection, row.id, row.fence, now=now, attempts=row.attempts)
            waiting = sa.and_(
                evaluations.c.status == QUEUED, evaluations.c.rung_at <= now - RING_AGAIN_S
            )
            longest = (evaluations.c.rung_at, evaluations.c.seq)
            query = sa.select(evaluations).where(waiting).order_by(*longest).limit(RING_TOGETHER)
            for row in connection.execute(query).all():
                connection.execute(
                    sa.update(evaluations).where(evaluations.c.id == row.id).values(rung_at=now)
                )
                ring.append((row.id, row.queue))
            connection.execute(sa.delete(workers).where(workers.c.seen_at < now - _GONE_S))
            cancelling = sa.and_(evaluations.c.status == RUNNING, evaluations.c.cancel == 1)
            query = sa.select(sa.func.min(evaluations.c.lease_until)).where(cancelling)
            until = connection.scalar(query)
        return Swept(ring, expired, None if until is None else max(0.0, until - now))

    def next_queued(self, queues: Sequence[str]) -> tuple[str, str] | None:
        """(id, queue) of the job of these queues that has waited longest."""
        query = (
            sa.select(evaluations.c.id, evaluations.c.queue)
            .where(evaluations.c.status == QUEUED, evaluations.c.queue.in_(queues))
            .order_by(evaluations.c.seq)
            .limit(1)
        )
        with self._database.transaction(writes=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row.id, row.queue)

    def seen(self, worker: str, queues: Sequence[str]) -> None:
        """A worker is there."""
        with self._database.transaction() as connection:
            values = {"queues": ",".join(queues), "seen_at": self._database.now(connection)}
            connection.execute(
                self._database.insert(workers)
                .values(name=worker, **values)
                .on_conflict_do_update(index_elements=["name"], set_=values)
            )

    def gone(self, worker: str) -> None:
        """A worker has ended."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(workers).where(workers.c.name == worker))

    def served(self) -> Mapping[str, bool]:
        """Queue -> whether a worker of it was seen lately."""
        with self._database.transaction(writes=False) as connection:
            since = self._database.now(connection) - WORKER_SEEN_S
            found = connection.execute(
                sa.select(workers.c.queues).where(workers.c.seen_at >= since)
            )
            alive = {queue for (queues,) in found for queue in queues.split(",")}
        return {queue: queue in alive for queue in QUEUES}

    def counts(self) -> Mapping[str, int]:
        """State -> jobs."""
        query = sa.select(evaluations.c.status, sa.func.count().label("jobs")).group_by(
            evaluations.c.status
        )
        with self._database.transaction(writes=False) as connection:
            found = {row.status: row.jobs for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in STATES}

    def oldest_queued_s(self, queue: str) -> float:
        """How long the job that has waited longest in a queue waits; 0 where none does."""
        query = sa.select(sa.func.min(evaluations.c.queued_since)).where(
            evaluations.c.status == QUEUED, evaluations.c.queue == queue
        )
        with self._database.transaction(writes=False) as connection:
            since = connection.scalar(query)
            return 0.0 if since is None else max(0.0, self._database.now(connection) - since)

    def close(self) -> None:
        """Close the connections."""
        self._database.close()


def _known(row: Any, digest: str) -> Job:
    if row.digest != digest:
        raise JobConflict
    return job_of(row)
