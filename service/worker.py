"""The worker of the evaluations: celery -A service.worker worker -Q cpu   (on GPU hosts -Q gpu)

In: settings from the environment (INVPROP_STATE, INVPROP_BUNDLE, INVPROP_DATASETS, where they
differ from a service on this host INVPROP_DATABASE and INVPROP_BROKER), and messages that name
jobs. Out: jobs ended in the database. One job at a time in a child process; this process imports
neither torch nor faiss. Start several workers for several jobs at a time.

A start with wrong settings, without the database, or that the broker refuses says `error: ...` and
exits with 1. Once it has begun, it waits for whatever goes away; and for a broker always.
"""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog
from celery import Celery, signals
from celery.worker import state as celery_state

from service.arguments import SettingsError, settings_from_environment
from service.attempt import COMMAND, JobRefused, Limits, attempt, device_of
from service.dataset_file import RegistryError
from service.datasets import Registry, UnknownDataset, open_registry
from service.doorbell import TASK, BrokerError, Doorbell, celery_application, refusal
from service.gallery.database import make_state
from service.gallery.protocol import GalleryError, StorageError
from service.job import QUEUES, Lease
from service.jobs import SWEEP_S, Jobs
from service.observability import configure_logging
from service.settings import Settings
from trainer.representation.bundle import BundleError, open_bundle

DIRECTORY = "evaluations"
FEATURES = "features"
STUCK_S = 60.0  # rung for, idle, and nothing comes: the connection is dead although it looks well
STUCK_EXIT = 75  # "try again": whoever started the worker starts it anew

_log = structlog.get_logger("service.evaluations")


class Worker:
    """What one worker process holds.

    Args:
        command: what evaluates, in a child process.
        stuck_s: how long jobs may wait while this worker is idle before it ends, to begin anew.
        sweep_s: how often it looks after the table, at most.
    """

    def __init__(
        self,
        settings: Settings,
        application: Celery,
        *,
        command: Sequence[str] = COMMAND,
        stuck_s: float = STUCK_S,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._settings = settings
        self._doorbell = Doorbell(application)
        self._command = command
        self._stuck_s = stuck_s
        self._sweep_s = min(sweep_s, settings.evaluation_lease_s / 4)
        self._jobs: Jobs | None = None
        self._datasets: Registry | None = None
        self._busy = False
        self._idle_since = time.monotonic()
        self._queues: tuple[str, ...] = ()
        self._ending = threading.Event()
        self._models: dict[tuple[Path, int], str] = {}

    @property
    def jobs(self) -> Jobs:
        """The table; opened at the first use, in the process that uses it."""
        if self._jobs is None:
            self.open()
        assert self._jobs is not None
        return self._jobs

    def open(self) -> None:
        """Reach the table.

        Raises:
            GalleryError: the URL names no database.
            StorageError: the database cannot be reached, or is damaged.
        """
        settings = self._settings
        self._jobs = Jobs(
            settings.state, settings.database_url(), lease_s=settings.evaluation_lease_s
        )

    def begin(self, queues: Sequence[str]) -> None:
        """Say that this worker is there, and look after the table beside the work."""
        self._queues = tuple(queue for queue in queues if queue in QUEUES)
        self._idle_since = time.monotonic()
        threading.Thread(target=self._look_after, name="sweeper", daemon=True).start()

    def end(self) -> None:
        """Say that this worker is gone."""
        self._ending.set()
        try:
            self.jobs.gone(self.name)
        except StorageError as error:
            _log.warning("not_signed_off", reason=str(error))

    def evaluate(self, job_id: str) -> None:
        """Work on a job, if nobody else does."""
        lease = self.jobs.lease(job_id, self.name)
        if lease is None:
            _log.info("nothing_to_do", job=job_id)
            return
        self._busy = True
        began = time.monotonic()
        directory = self._settings.state / DIRECTORY / job_id
        _log.info("evaluation_begins", job=job_id, attempt=lease.job.attempts)
        try:
            outcome = attempt(
                self.jobs,
                lease,
                describe=self._describe,
                directory=directory / str(lease.fence),
                limits=Limits(
                    self._settings.evaluation_timeout_s, self._settings.evaluation_memory_bytes
                ),
                stopping=lambda: (
                    celery_state.should_stop is not None
                    or celery_state.should_terminate is not None
                ),
                command=self._command,
            )
        finally:
            self._busy, self._idle_since = False, time.monotonic()
            shutil.rmtree(directory, ignore_errors=True)  # what killed attempts left, too
        _log.info(
            "evaluation_ends",
            job=job_id,
            outcome=outcome,
            duration_s=round(time.monotonic() - began, 3),
        )
        # Whoever has worked rings for the next: a queue whose messages were lost empties all the
        # same, although a sweep rings for a few only.
        waiting = self.jobs.next_queued(self._queues)
        if waiting is not None:
            self._doorbell.ring(*waiting)

    def is_stuck(self, queues: Sequence[str]) -> bool:
        """Whether jobs of these queues wait, this worker is idle, and none came for a while."""
        if self._busy or time.monotonic() - self._idle_since < self._stuck_s:
            return False
        return any(self.jobs.oldest_queued_s(queue) > self._stuck_s for queue in queues)

    def _describe(self, lease: Lease) -> Mapping[str, Any]:
        request = lease.job.request
        settings = self._settings
        try:
            model = self._model_of(settings.bundle)
        except BundleError as error:
            raise JobRefused("bundle_invalid", str(error)) from error
        if model != request.model:
            raise JobRefused(
                "model_changed",
                f"the evaluation was asked for of model {request.model[:12]}, the bundle of this "
                f"worker is {model[:12]}; ask again, or give the worker the bundle that is served",
            )
        try:
            if self._datasets is None:
                self._datasets = open_registry(settings.datasets)
            dataset = self._datasets.get(request.dataset).spec()
        except (UnknownDataset, RegistryError) as error:
            raise JobRefused("dataset_unknown", f"the worker: {error}") from error
        return {
            "protocol": request.protocol,
            "bundle": str(settings.bundle.absolute()),
            "dataset": dataset,
            "settings": request.settings,
            "seed": request.seed,
            "device": device_of(request.queue),
            "cache": str((settings.state / DIRECTORY / FEATURES).absolute()),
        }

    def _model_of(self, bundle: Path) -> str:
        """Its model_id; every file is compared with its hash once."""
        resolved = bundle.resolve()
        try:
            mark = (resolved, (resolved / "manifest.json").stat().st_mtime_ns)
        except OSError:
            mark = (resolved, 0)  # open_bundle says what is wrong
        if mark not in self._models:
            self._models[mark] = open_bundle(bundle).model_id
        return self._models[mark]

    def _look_after(self) -> None:
        while True:
            try:
                self.jobs.seen(self.name, self._queues)
                self._doorbell.ring_all(self.jobs.sweep().ring)
                if self.is_stuck(self._queues):
                    _log.error("worker_stuck", idle_s=round(time.monotonic() - self._idle_since))
                    sys.stderr.flush()
                    os._exit(STUCK_EXIT)
            except StorageError as error:
                _log.warning("sweep_failed", reason=str(error))
            except Exception as error:  # noqa: BLE001 - the thread's door: it watches, too
                _log.error("sweep_failed", exc_info=error)
            if self._ending.wait(self._sweep_s):
                return


def make(settings: Settings, **options: Any) -> Celery:
    """The Celery application with a worker behind its task; makes the state directory.

    Raises:
        GalleryError: it cannot be made.
        BrokerError: the broker's URL cannot be used.
    """
    make_state(settings.state)
    broker = settings.broker_url()
    application = celery_application(settings.state, broker, limit_s=settings.evaluation_timeout_s)
    worker = Worker(settings, application, **options)

    def prepare(**_: Any) -> None:
        try:
            worker.open()
        except GalleryError as error:
            _fail(str(error))
        except StorageError as error:
            where = "INVPROP_STATE" if settings.database is None else "INVPROP_DATABASE"
            _fail(f"{error}; {where} says where they are")
        refused = refusal(application)
        if refused is not None:
            _fail(f"{refused}; INVPROP_BROKER has to give user and password")

    def begin(sender: Any, **_: Any) -> None:
        worker.begin(list(sender.app.amqp.queues.consume_from))

    def evaluate(job_id: str) -> None:
        if isinstance(job_id, str):  # a message may hold anything
            worker.evaluate(job_id)

    # Celery's decorators are untyped; signals keep weak references unless told otherwise.
    signals.setup_logging.connect(lambda **_: configure_logging(settings.log_level), weak=False)
    signals.worker_init.connect(prepare, weak=False)
    signals.worker_ready.connect(begin, weak=False)
    signals.worker_shutdown.connect(lambda **_: worker.end(), weak=False)
    application.task(name=TASK, ignore_result=True)(evaluate)
    return application


def __getattr__(name: str) -> Any:
    """`app`, made when Celery asks for it: settings come from the environment."""
    if name in ("app", "celery"):
        try:
            return make(settings_from_environment())
        except (SettingsError, GalleryError, BrokerError) as error:
            _fail(str(error))
    raise AttributeError(name)


def _fail(reason: str) -> NoReturn:
    """End before anything has begun. Celery would put a traceback around an exception."""
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(1)
