"""Evaluations as the service sees them: checked when asked for, rung for, looked after.

In: requests. Out: jobs in the table of service.jobs, and messages for workers. What may be asked is
checked against evaluation_job.schema.json, which the trainer wrote: the service imports none of it.
"""

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import structlog

from service.datasets import Registry, UnknownDataset
from service.doorbell import Doorbell, celery_application
from service.errors import Problem, queue_full
from service.gallery.protocol import StorageError
from service.job import CPU, GPU, QUEUES, Job, JobConflict, JobsFull, Request
from service.jobs import SWEEP_S, Jobs
from service.metrics import Metrics
from service.settings import Settings

SCHEMA_FILE = Path(__file__).with_name("evaluation_job.schema.json")
_AFTER_S = 0.1  # a lease is over when its time has passed, not when it has come
# Hours on a CPU at the least: these ask for a GPU unless they say otherwise.
ON_GPU = frozenset({"detection"})

_log = structlog.get_logger("service.evaluations")


class Protocols:
    """The protocols there are, and what settings each takes."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        mapping = schema["discriminator"]["mapping"]
        definitions = schema["$defs"]
        self._validators = {}
        for name, reference in mapping.items():
            job = definitions[reference.rpartition("/")[2]]
            settings = {"$defs": definitions, "$ref": job["properties"]["settings"]["$ref"]}
            self._validators[name] = jsonschema_rs.Draft202012Validator(settings)
        self._seed = jsonschema_rs.Draft202012Validator(definitions["KnnJob"]["properties"]["seed"])
        self.names = tuple(sorted(mapping))

    def check(self, protocol: str, settings: Mapping[str, Any], seed: int) -> None:
        """Refuse what the trainer would refuse.

        Raises:
            Problem: invalid_request, with `errors` naming each key.
        """
        validator = self._validators.get(protocol)
        if validator is None:
            raise Problem(
                "invalid_request",
                f"there is no protocol {protocol[:64]!r}; there are {', '.join(self.names)}",
                errors=[{"field": "protocol", "reason": "unknown"}],
            )
        found = [_explained("settings", error) for error in validator.iter_errors(settings)]
        found += [_explained("seed", error) for error in self._seed.iter_errors(seed)]
        if found:
            said = "; ".join(f"{field}: {reason}" for field, reason in found[:5])
            raise Problem(
                "invalid_request",
                f"{protocol}: {said}",
                errors=[{"field": f, "reason": r} for f, r in found[:100]],
            )


def _explained(root: str, error: jsonschema_rs.ValidationError) -> tuple[str, str]:
    """The key, and what is wrong with it."""
    kinds = jsonschema_rs.ValidationErrorKind
    if isinstance(error.kind, kinds.AnyOf):  # what may also be null: told as if it might not
        (branch, *_) = error.kind.context
        return _explained(root, branch[0])
    field = ".".join([root, *map(str, error.instance_path)])
    if isinstance(error.kind, kinds.AdditionalProperties):
        return field, f"there is no key {', '.join(map(repr, error.kind.unexpected))}"
    return field, error.message[:300]


class Evaluations:
    """Jobs with their doorbell and their sweeper; `close` ends the threads.

    Args:
        jobs: the table; closed here only where it was opened here.

    Raises:
        StorageError: the table cannot be opened.
    """

    def __init__(
        self,
        settings: Settings,
        datasets: Registry,
        metrics: Metrics,
        *,
        jobs: Jobs | None = None,
        doorbell: Doorbell | None = None,
    ) -> None:
        self._settings = settings
        self._datasets = datasets
        self._metrics = metrics
        self._given = jobs is not None
        self.jobs = jobs or Jobs(
            settings.state, settings.database_url(), lease_s=settings.evaluation_lease_s
        )
        self._doorbell = doorbell or Doorbell(
            celery_application(
                settings.state, settings.broker_url(), limit_s=settings.evaluation_timeout_s
            )
        )
        self.protocols = Protocols(json.loads(SCHEMA_FILE.read_bytes()))
        self.streams = 0  # of events, being sent
        self._ringing = ThreadPoolExecutor(1, "doorbell")
        self._ending = False
        self._look = threading.Event()  # there is something to see before the interval is over
        self._sweeper = threading.Thread(target=self._look_after, name="sweeper", daemon=True)
        self._sweeper.start()

    def submit(
        self,
        protocol: str,
        dataset: str,
        settings: Mapping[str, Any],
        seed: int,
        *,
        device: str | None,
        model: str,
        key: str | None,
    ) -> Job:
        """Accept an evaluation; it is on disk when this returns, and rung for soon after.

        Raises:
            Problem: invalid_request, dataset_not_found, no_such_worker, idempotency_conflict,
                queue_full.
            StorageError: it could not be stored.
        """
        self.protocols.check(protocol, settings, seed)
        try:
            self._datasets.get(dataset)
        except UnknownDataset as error:
            raise Problem("dataset_not_found", f"{error}; GET /datasets lists them") from None
        queue = GPU if device == "cuda" or (device is None and protocol in ON_GPU) else CPU
        if queue == GPU and not self.jobs.served()[GPU]:
            raise Problem(
                "no_such_worker",
                f"{protocol} on a GPU waits in the queue `gpu`, and no worker of it was seen "
                "lately; start one on a host with a GPU (celery -A service.worker worker -Q gpu), "
                'or ask for `"device": "cpu"`',
                queue=GPU,
            )
        request = Request(protocol, dataset, dict(settings), seed, model, queue)
        try:
            job, is_new = self.jobs.submit(
                request, key=key, pending_limit=self._settings.evaluations_pending
            )
        except JobConflict:
            raise Problem(
                "idempotency_conflict",
                "this Idempotency-Key was used for a request with another content; use a new key "
                "for a new request",
            ) from None
        except JobsFull as full:
            raise queue_full("evaluations", full.limit, "evaluations_pending") from None
        if is_new:
            # Beside the answer: a broker that is away must not make anybody wait.
            self._ringing.submit(self._doorbell.ring, job.id, queue)
        return job

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job; one that a worker holds ends within jobs.CANCEL_S, worker or not."""
        job = self.jobs.cancel(job_id)
        if job is not None and not job.ended:
            self._look.set()
        return job

    def described(self, job: Job, *, report: bool = False) -> dict[str, Any]:
        """A job as the contract has it; with its report where that is asked for and there."""
        found = self.jobs.report(job.id) if report and job.status == "succeeded" else None
        waiting = None
        if job.status == "queued" and not self.jobs.served()[job.request.queue]:
            waiting = f"a worker of the queue {job.request.queue}"
        return {
            "id": job.id,
            "status": job.status,
            "protocol": job.request.protocol,
            "dataset": job.request.dataset,
            "settings": job.request.settings,
            "seed": job.request.seed,
            "model": job.request.model,
            "queue": job.request.queue,
            "waiting_for": waiting,
            "progress": job.progress,
            "attempts": job.attempts,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "report": None if found is None else found[0],
            "error": job.error,
        }

    def begin_stream(self) -> None:
        """Count one more stream of events.

        Raises:
            Problem: queue_full.
        """
        limit = self._settings.evaluation_streams
        if self.streams >= limit:
            raise queue_full("streams of events", limit, "evaluation_streams")
        self.streams += 1

    def end_stream(self) -> None:
        """Count one stream less."""
        self.streams -= 1

    def close(self) -> None:
        """End the threads; what is accepted stays."""
        self._ending = True
        self._look.set()
        self._sweeper.join()
        self._ringing.shutdown(cancel_futures=True)  # the next sweep rings for them
        if not self._given:
            self.jobs.close()

    def _look_after(self) -> None:
        interval = min(SWEEP_S, self._settings.evaluation_lease_s / 4)
        self._doorbell.say_if_refused()
        while True:
            self._look.clear()
            if self._ending:
                return
            wait_s = interval
            try:
                swept = self.jobs.sweep()
                if swept.again_s is not None:
                    wait_s = min(interval, swept.again_s + _AFTER_S)
                self._metrics.evaluation_leases_expired.inc(swept.expired)
                self._doorbell.ring_all(swept.ring)
                for state, count in self.jobs.counts().items():
                    self._metrics.evaluations.labels(state).set(count)
                for queue in QUEUES:
                    age = self.jobs.oldest_queued_s(queue)
                    self._metrics.evaluation_queue_age.labels(queue).set(age)
                for queue, served in self.jobs.served().items():
                    self._metrics.evaluation_workers.labels(queue).set(served)
            except StorageError as error:
                _log.warning("sweep_failed", reason=str(error), retry_s=interval)
            except Exception as error:  # noqa: BLE001 - the thread's door: others depend on sweeps
                _log.error("sweep_failed", exc_info=error, retry_s=interval)
            self._look.wait(wait_s)


def not_found(job_id: str) -> Problem:
    """The problem of an id that no evaluation has."""
    return Problem(
        "evaluation_not_found",
        f"there is no evaluation {job_id[:64]!r}; GET /evaluations lists them",
    )
