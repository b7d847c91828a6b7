"""What an operator sees of a running service: JSON log lines with a request id, and metrics.

In: requests as they pass. Out: structured lines on stderr, and figures for service.metrics. No user
data: neither ids nor file names nor vectors are logged or used as labels.
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
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import CALLER
from service.errors import PROBLEM_CODE, unexpected
from service.metrics import Metrics

REQUEST_ID_HEADER = "X-Request-Id"
_RAW_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
# A caller's request id is kept when it is harmless in a log line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

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
