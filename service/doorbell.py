"""Celery's part of the evaluations: ringing for a job, on whatever broker there is.

In: a broker's URL, or none: then messages are files in the state directory. Out: a Celery
application, and messages that carry a job's id and nothing else. Messages may be lost or come
twice: service.jobs decides who works on what.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from amqp.exceptions import AccessRefused, AMQPError, NotAllowed
from celery import Celery
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import AuthenticationError

from service.job import CPU, GPU

TASK = "invprop.evaluate"
BROKER_DIRECTORY = "broker"
SCHEMES = ("filesystem", "redis", "rediss", "amqp", "amqps")
_FILES = "filesystem://"
_CONNECT_TIMEOUT_S = 1.5

_log = structlog.get_logger("service.evaluations")


class BrokerError(ValueError):
    """The broker's URL cannot be used; says what was wanted, and no password."""


def celery_application(state: Path, broker: str | None, *, limit_s: float) -> Celery:
    """The application of both sides; connects to nothing yet.

    Args:
        state: the state directory; holds the messages where there is no broker.
        broker: redis://, rediss://, amqp:// or amqps:// URL.
        limit_s: how long the longest job may take.

    Raises:
        BrokerError: the URL's scheme is none of these, or there is no place for the files.
    """
    application = Celery("invprop", set_as_current=False)
    options: dict[str, Any] = {}
    scheme = "filesystem" if broker is None else broker.partition("://")[0]
    if scheme not in SCHEMES:
        raise BrokerError(
            f"the broker's URL begins with {scheme[:16]}://; wanted redis://, rediss://, amqp:// "
            "or amqps://, or none for files in the state directory"
        )
    if scheme == "filesystem":
        folder = (state / BROKER_DIRECTORY).absolute()
        messages, control = folder / "messages", folder / "control"
        for each in (messages, control):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BrokerError(f"{each} cannot be made: {error.strerror}") from error
        options = {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
        }
    elif scheme.startswith("redis"):
        options = {
            # A message that nobody acknowledged comes again after this: longer than any job.
            "visibility_timeout": max(12 * 3600, 2 * int(limit_s)),
            "unacked_restore_throttle": 1,
            "socket_connect_timeout": _CONNECT_TIMEOUT_S,
            "socket_timeout": 3.0,
            "health_check_interval": 25,
            "retry_on_timeout": True,
        }
    application.conf.update(
        broker_url=_FILES if scheme == "filesystem" else broker,
        broker_transport_options=options,
        broker_connection_timeout=_CONNECT_TIMEOUT_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=0,  # a worker that is at work does not answer
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,  # results are in the database
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        # One job at a time, in a process of its own that the worker watches over: see worker.py.
        worker_pool="solo",
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        task_default_queue=CPU,
        task_create_missing_queues=True,
        task_routes=None,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # the jobs table says what goes on, and cancels
        event_queue_ttl=60.0,
    )
    return application


def refusal(application: Celery) -> str | None:
    """Why the broker lets nobody in who comes as we do: a wrong password, or none where one is due.

    None where it does, and where it cannot be reached: that may change without anybody's doing.
    """
    if application.conf.broker_url == _FILES:
        return None
    with application.connection_for_read() as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0)
        except (AccessRefused, NotAllowed) as error:
            refused: Exception = error
        except OperationalError as error:
            if not isinstance(error.__cause__, AuthenticationError):
                return None
            refused = error
        else:
            return None
        said = str(refused).rstrip(".")
        return f"the broker {connection.as_uri()} refuses the connection: {said}"


class Doorbell:
    """Rings for jobs; a broker that cannot be reached is logged, and the sweeper rings again."""

    def __init__(self, application: Celery) -> None:
        self._application = application

    def say_if_refused(self) -> None:
        """Log it, before somebody waits for an evaluation."""
        refused = refusal(self._application)
        if refused is not None:
            _log.error(
                "broker_refused",
                reason=refused,
                note="evaluations are accepted and wait; INVPROP_BROKER has to give user and "
                "password",
            )

    def ring(self, job_id: str, queue: str) -> bool:
        """Send a message for a job; False where the broker cannot be reached."""
        assert queue in (CPU, GPU)
        try:
            self._application.send_task(
                TASK, args=[job_id], queue=queue, retry=False, ignore_result=True
            )
        except (KombuError, OperationalError, AMQPError, OSError) as error:
            _log.warning(
                "broker_unreachable", job=job_id, reason=f"{type(error).__name__}: {error}"
            )
            return False
        return True

    def ring_all(self, jobs: Sequence[tuple[str, str]]) -> None:
        """Ring for (id, queue); not for the rest once the broker turns out to be away."""
        for job_id, queue in jobs:
            if not self.ring(job_id, queue):
                return
