"""The HTTP protocol with its own bounds: uvicorn's, plus deadlines and sizes that it has not.

In: the bytes of connections. Out: requests for the application; whoever is too slow, too long or
one too many is answered with a problem and closed. Deadlines are looked at once a second for all
connections together (`Connections.sweep`), so that a request pays nothing for them.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.errors import RETRY_AFTER_S, Problem, over_limit
from service.metrics import Metrics
from service.observability import SECURITY_HEADERS
from service.settings import Settings

MAX_PIPELINED = 16  # requests read ahead on one connection while another is answered
LINGER_S = 5.0  # how long the rest of a body is taken in that nobody wants any more
MIN_READER_BYTES_PER_S = 16_384  # a client that reads its answer slower than this is closed


class Connections:
    """What the connections of one server share.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.open: set[BoundedProtocol] = set()
        self.waiting: dict[BoundedProtocol, None] = {}  # without a request, the oldest first

    def sweep(self) -> None:
        """Close what has passed its deadline; call it about once a second."""
        now = self.clock()
        for connection in list(self.open):
            connection.check(now)

    def make_room(self) -> bool:
        """Close the connection that has been without a request for longest, if there is one."""
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        self.metrics.connections_closed.labels("displaced").inc()
        oldest.leave()
        return True


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration, with what the protocol needs beside it."""

    def __init__(self, app: Any, connections: Connections, **options: Any) -> None:
        super().__init__(app, http=BoundedProtocol, ws="none", **options)
        self.connections = connections


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, BoundedConfig)
        self._shared = config.connections
        self._settings = config.connections.settings
        self._in_body = False
        self._unpaid = 0  # bytes since the request began, or since the last bytes of its body
        self._deadline: float | None = None
        self._reader: tuple[float, int] | None = None  # since when, bytes that were left then

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared, limit = self._shared, self._settings.max_connections
        if len(shared.open) >= limit and not shared.make_room():
            self._refuse(
                Problem(
                    "overloaded",
                    f"{limit:,} connections are being answered already, as many as "
                    "`max_connections` allows; try again shortly",
                    retry_after_s=RETRY_AFTER_S,
                    limit=limit,
                    setting="max_connections",
                ),
                "too_many",
            )
            return
        shared.open.add(self)
        shared.waiting[self] = None
        shared.metrics.connections.set(len(shared.open))
        self._deadline = shared.clock() + self._settings.header_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:  # a further request on this connection, or the begin of one
            self._deadline = self._shared.clock() + self._settings.header_timeout_s
        self._unpaid += len(data)
        super().data_received(data)
        limit = self._settings.max_header_bytes
        if self._unpaid > limit and not self.transport.is_closing():
            self._refuse(
                over_limit("headers_too_large", "bytes of headers", self._unpaid,
                           "max_header_bytes", limit),
                "too_large",
            )  # fmt: skip

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests were sent ahead")  # becomes a 400 and a close
        self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers are not read
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_body, self._unpaid = True, 0
        self._deadline = self._shared.clock() + self._settings.body_timeout_s
        self._shared.waiting.pop(self, None)

    def on_body(self, body: bytes) -> None:
        self._unpaid = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body, self._unpaid, self._deadline = False, 0, None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._in_body and self._deadline is not None:
            # Refused early. Closing now would throw the answer away with what is still arriving.
            self._deadline = min(self._deadline, self._shared.clock() + LINGER_S)
        elif not self.pipeline:
            self._shared.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = (self._shared.clock(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._reader = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem("bad_request", "the request is no HTTP/1.1"), "bad_request")

    def check(self, now: float) -> None:
        """Close the connection when it has passed its deadline."""
        if self.transport.is_closing():
            return
        if self._deadline is not None and now >= self._deadline:
            part, setting = ("body", "body_timeout_s") if self._in_body else (
                "head", "header_timeout_s")  # fmt: skip
            limit = getattr(self._settings, setting)
            self._refuse(
                Problem(
                    "request_timeout",
                    f"the {part} of the request did not arrive within {limit:g} s; the operator "
                    f"may raise `{setting}`",
                    limit=limit,
                    setting=setting,
                ),
                f"slow_{part}",
            )
        elif self._reader is not None:
            since, left = self._reader
            waited = now - since
            if waited < self._settings.body_timeout_s:
                return
            size = self.transport.get_write_buffer_size()
            if left - size < MIN_READER_BYTES_PER_S * waited:
                self._shared.metrics.connections_closed.labels("slow_reader").inc()
                self._forget()
                self.transport.abort()
            else:
                self._reader = (now, size)

    def leave(self) -> None:
        """Close a connection that has no request."""
        self._forget()
        self.transport.close()

    def _refuse(self, problem: Problem, reason: str) -> None:
        """Answer, unless an answer has begun, and close."""
        self._shared.metrics.connections_closed.labels(reason).inc()
        self._forget()
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_raw(problem))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # whoever still works on it learns that nobody listens
            cycle.message_event.set()
        self.transport.close()

    def _forget(self) -> None:
        self._deadline = self._reader = None
        self._shared.waiting.pop(self, None)
        self._shared.open.discard(self)
        self._shared.metrics.connections.set(len(self._shared.open))


def _raw(problem: Problem) -> bytes:
    response = problem.response({"Connection": "close", **SECURITY_HEADERS})
    lines = [name + b": " + value for name, value in response.raw_headers]
    head = b"\r\n".join([STATUS_LINE[response.status_code].rstrip(b"\r\n"), *lines])
    return head + b"\r\n\r\n" + bytes(response.body)
