"""What an operator sees of a running service: JSON log lines with a request id, and metrics.

In: requests as they pass, and what the stages report. Out: structured lines on stderr and
Prometheus text. No user data: neither ids nor file names nor vectors are logged or used as labels.
"""

import asyncio
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import orjson
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import CALLER
from service.errors import PROBLEM_CODE, unexpected

REQUEST_ID_HEADER = "X-Request-Id"
_RAW_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
# A caller's request id is kept when it is harmless in a log line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Of every answer. A page may load what comes from here and nothing else, and stand in no frame.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
}
_RAW_SECURITY_HEADERS = [
    (name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
]
CLIENT_GONE = 499  # in log and metrics: nobody was there to be answered
_LAG_EVERY_S = 0.5

_log = structlog.get_logger("service")


def configure_logging(level: str = "info") -> None:
    """Write one JSON object per line to stderr, for our lines and for the web server's."""
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*processors, structlog.processors.JSONRenderer(_json)],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors, processor=structlog.processors.JSONRenderer()
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    # Its warnings quote the bodies that it cannot read.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _json(event: object, default: Callable[[Any], Any]) -> str:
    return orjson.dumps(event, default=default).decode()


class Metrics:
    """The Prometheus metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "invprop_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=registry,
        )
        self.request_duration = Histogram(
            "invprop_request_duration_seconds",
            "From the first byte to the last of the answer",
            ["method", "route"],
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.queue_size = Gauge(
            "invprop_queue_size", "Images accepted and not yet embedded", registry=registry
        )
        self.queue_duration = Histogram(
            "invprop_queue_duration_seconds",
            "Time an image waited for the encoder",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.queue_oldest = Gauge(
            "invprop_queue_oldest_seconds",
            "How long the image that is next for the encoder has waited",
            registry=registry,
        )
        self.batches = Counter(
            "invprop_batches",
            "Runs of the encoder by why they were let go: full (max_batch), drained (all that "
            "waited), shared (other idle threads took the rest)",
            ["reason"],
            registry=registry,
        )
        self.batch_size = Histogram(
            "invprop_batch_size",
            "Images in one run of the encoder",
            registry=registry,
            buckets=_BATCH_BUCKETS,
        )
        self.decode_duration = Histogram(
            "invprop_decode_duration_seconds",
            "Time to decode one image",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.decode_queue_duration = Histogram(
            "invprop_decode_queue_duration_seconds",
            "Time an image waited for a decoder process",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.decode_queue_size = Gauge(
            "invprop_decode_queue_size",
            "Images that wait for a decoder process",
            registry=registry,
        )
        self.inference_duration = Histogram(
            "invprop_inference_duration_seconds",
            "Time of one run of the encoder",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.search_duration = Histogram(
            "invprop_search_duration_seconds",
            "Time of one request's search, waiting included",
            ["route"],
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.images_rejected = Counter(
            "invprop_images_rejected", "Images that could not be decoded", registry=registry
        )
        self.decoders_replaced = Counter(
            "invprop_decoders_replaced",
            "Decoder processes replaced",
            ["reason"],
            registry=registry,
        )
        self.index_vectors = Gauge(
            "invprop_index_vectors", "Items in the gallery", registry=registry
        )
        self.index_bytes = Gauge(
            "invprop_index_bytes",
            "Memory of the search index: vectors, graph, metadata",
            ["kind"],
            registry=registry,
        )
        self.generation_seq = Gauge(
            "invprop_generation_seq",
            "Sequence number of the last change in the newest generation on disk",
            registry=registry,
        )
        self.log_damaged = Gauge(
            "invprop_log_damaged",
            "1 when the log was found to be damaged: searches go on, changes are refused",
            registry=registry,
        )
        self.gallery_version = Gauge(
            "invprop_gallery_version", "Sequence number of the last change", registry=registry
        )
        self.gallery_staleness = Gauge(
            "invprop_gallery_staleness_seconds",
            "Since the gallery was last seen to hold every change of its log",
            registry=registry,
        )
        self.gallery_lag = Gauge(
            "invprop_gallery_lag_operations",
            "Changes of the log, when last looked at, that the gallery does not hold yet",
            registry=registry,
        )
        self.event_loop_lag = Histogram(
            "invprop_event_loop_lag_seconds",
            "How much later than asked the event loop wakes a task",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.connections = Gauge("invprop_connections", "Open connections", registry=registry)
        self.connections_closed = Counter(
            "invprop_connections_closed",
            "Connections closed for what they did or did not do",
            ["reason"],
            registry=registry,
        )
        self.pending_body_bytes = Gauge(
            "invprop_pending_body_bytes",
            "What bodies of unanswered requests take in memory, as max_pending_body_bytes counts",
            registry=registry,
        )
        self.problems = Counter(
            "invprop_problems", "Errors answered, by code", ["code"], registry=registry
        )
        ProcessCollector(registry=registry)  # memory, CPU, file descriptors
        self.graph_version = Gauge(
            "invprop_graph_version",
            "gallery_version of the kNN graph that is kept; behind the gallery's while it is made",
            registry=registry,
        )
        self.graph_progress = Gauge(
            "invprop_graph_progress",
            "Share (0..1) that is done of the kNN graph of the next version",
            registry=registry,
        )
        self.evaluations = Gauge(
            "invprop_evaluations",
            "Evaluations by state, at the last sweep",
            ["status"],
            registry=registry,
        )
        self.evaluation_queue_age = Gauge(
            "invprop_evaluation_queue_age_seconds",
            "How long the evaluation waits that has waited longest",
            ["queue"],
            registry=registry,
        )
        self.evaluation_workers = Gauge(
            "invprop_evaluation_workers",
            "1 where a worker of the queue was seen lately",
            ["queue"],
            registry=registry,
        )
        self.evaluation_leases_expired = Counter(
            "invprop_evaluation_leases_expired",
            "Evaluations taken from workers that fell silent, by this process",
            registry=registry,
        )
        self.build_info = Gauge(
            "invprop_build_info",
            "1, with what is running as labels",
            ["version", "model", "execution_provider", "precision"],
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


async def watch_event_loop(metrics: Metrics) -> None:
    """Measure for ever how late the event loop is."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(_LAG_EVERY_S)
        metrics.event_loop_lag.observe(max(0.0, time.perf_counter() - started - _LAG_EVERY_S))


class ObserveRequests:
    """ASGI layer around everything: request id, one log line, two metrics, and the last door.

    An exception that no handler knew is logged here and answered as `internal_error`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        # Few routes with few statuses: prometheus_client takes longer to find their series.
        self._counted = functools.cache(self._series)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        started = time.perf_counter()
        status = 0

        method = scope["method"]
        without_body = method == "HEAD"
        if without_body:  # served wherever GET is
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [*message.get("headers", ()), (_RAW_REQUEST_ID, request_id.encode())]
                named = {name for name, _ in own}  # a route may be stricter than all of them
                ours = [header for header in _RAW_SECURITY_HEADERS if header[0] not in named]
                message["headers"] = own + ours
            elif without_body:
                message = {**message, "body": b""}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:  # it went away while it sent its body
                status = CLIENT_GONE
            except Exception as error:  # noqa: BLE001 - the door of a request
                response = unexpected(error)
                if status == 0:
                    await response(scope, receive, send_with_id)
            finally:
                self._record(scope, method, status, time.perf_counter() - started)

    def _series(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        metrics = self._metrics
        return (
            metrics.requests.labels(method, route, str(status)),
            metrics.request_duration.labels(method, route),
        )

    def _record(self, scope: Scope, method: str, status: int, duration_s: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = method if method in _METHODS else "other"
        count, duration = self._counted(method, route, status)
        count.inc()
        duration.observe(duration_s)
        code = scope.get(PROBLEM_CODE)
        if code is not None:
            self._metrics.problems.labels(code).inc()
        level = logging.WARNING if status >= 500 or status == 0 else logging.INFO
        if route in PROBES and status < 400:  # all is well, once a second and more
            level = logging.DEBUG
        _log.log(
            level,
            "request",
            method=method,
            route=route,
            status=status,
            code=code,
            key=getattr(scope.get(CALLER), "key", None),
            duration_ms=round(duration_s * 1000, 2),
        )


PROBES = {"/livez", "/readyz"}
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
