"""What a request may cost before anything is done for it: an ASGI layer, and what it counts with.

In: requests whose caller is known. Out: refusals that name the limit and its setting, or the
request passed on with its body counted while it arrives. A body counts against
`max_pending_body_bytes` until its request is answered, by what it takes in memory: twice its bytes
(as it arrived and as it is used), and for JSON the values that it becomes.
"""

import contextvars
import math
import time

import numpy as np
from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import CALLER, Caller
from service.errors import RETRY_AFTER_S, Problem, over_limit
from service.metrics import Metrics
from service.settings import IMAGES_WINDOW_S, Settings

# What CPython takes for small ones, with their place in another; tests/service/test_admission.py
# measures it.
BYTES_PER_DICT = 240
BYTES_PER_LIST = 96
BYTES_PER_VALUE = 56
_COPIES = 2
_SIGNS = (b"[", b"{", b",", b":")
_SHORT = 1024
_NO_JSON = ("image/", "multipart/form-data", "application/x-npy")

_caller: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)


class Rates:
    """Requests and images of each caller over time; 0 in the settings is no limit."""

    def __init__(self, settings: Settings) -> None:
        self._requests = settings.max_requests_per_s
        self._images = settings.max_images_per_s
        self._strategy = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take_request(self, caller: Caller) -> None:
        """Count one request.

        Raises:
            Problem: rate_limited.
        """
        if self._requests:
            self._take(caller, 1, "requests", self._requests, 1, "max_requests_per_s")

    def take_images(self, count: int) -> None:
        """Count the images of the request that runs.

        Raises:
            Problem: rate_limited.
        """
        caller = _caller.get()
        if self._images and caller is not None:
            self._take(caller, count, "images", self._images, IMAGES_WINDOW_S, "max_images_per_s")

    def _take(
        self, caller: Caller, cost: int, what: str, per_s: int, window_s: int, setting: str
    ) -> None:
        item = RateLimitItemPerSecond(per_s * window_s, window_s, namespace=what)
        if self._strategy.hit(item, caller.identity, cost=cost):
            return
        reset = self._strategy.get_window_stats(item, caller.identity).reset_time
        wait_s = max(1, math.ceil(reset - time.time()))
        over = f" over {window_s} s" if window_s > 1 else ""
        raise Problem(
            "rate_limited",
            f"{cost:,} {what} on top of those just sent are more than {per_s:,} a second{over}, "
            f"as many as `{setting}` allows each caller; try again in {wait_s} s",
            retry_after_s=wait_s,
            limit=per_s,
            setting=setting,
        )


class Admit:
    """ASGI layer: rate, length of the URL, encoding and size of the body."""

    def __init__(self, app: ASGIApp, *, settings: Settings, rates: Rates, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._rates = rates
        self._metrics = metrics
        self._pending = 0  # bytes, over all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = self._check(scope)
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        body = _Body(self, _may_be_json(headers), receive)
        token = _caller.set(scope[CALLER])
        try:
            await self._app(scope, body.receive, send)
        finally:
            _caller.reset(token)
            self.release(body.counted)

    def take(self, cost: int, counted: int) -> None:
        """Count `cost` more bytes of a body of which `counted` are counted.

        Raises:
            Problem: body_too_large, queue_full.
        """
        limit = self._settings.max_pending_body_bytes
        if counted + cost > limit:
            raise over_limit(
                "body_too_large",
                "bytes that the body takes in memory",
                counted + cost,
                "max_pending_body_bytes",
                limit,
            )
        if self._pending + cost > limit:
            raise Problem(
                "queue_full",
                f"bodies of other requests take {self._pending:,} bytes of memory, with this one "
                f"more than the {limit:,} that `max_pending_body_bytes` allows; try again shortly",
                retry_after_s=RETRY_AFTER_S,
                limit=limit,
                setting="max_pending_body_bytes",
            )
        self._pending += cost
        self._metrics.pending_body_bytes.set(self._pending)

    def release(self, cost: int) -> None:
        """Give back what was taken."""
        if cost:
            self._pending -= cost
            self._metrics.pending_body_bytes.set(self._pending)

    def _check(self, scope: Scope) -> Headers:
        settings, headers, caller = self._settings, Headers(scope=scope), scope[CALLER]
        if not caller.is_open:
            self._rates.take_request(caller)
        url_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if url_bytes > settings.max_url_bytes:
            raise over_limit(
                "url_too_long", "bytes in the URL", url_bytes, "max_url_bytes",
                settings.max_url_bytes,
            )  # fmt: skip
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise Problem(
                "unsupported_media_type",
                f"Content-Encoding is {encoding[:32]}; send the body as it is",
                supported=["identity"],
            )
        announced = headers.get("content-length", "0")
        if announced.isdigit():
            self._check_size(int(announced))
            self.take(_COPIES * int(announced), 0)  # would not fit: refused before it is read
            self.release(_COPIES * int(announced))
        return headers

    def _check_size(self, got: int) -> None:
        limit = self._settings.max_body_bytes
        if got > limit:
            raise over_limit("body_too_large", "bytes in the body", got, "max_body_bytes", limit)

    def received(self, got: int) -> None:
        """Refuse a body by its real size.

        Raises:
            Problem: body_too_large.
        """
        self._check_size(got)


class _Body:
    """The body of one request on its way in."""

    def __init__(self, admit: Admit, is_json: bool, receive: Receive) -> None:
        self.counted = 0
        self._admit = admit
        self._is_json = is_json
        self._receive = receive
        self._size = 0

    async def receive(self) -> Message:
        message = await self._receive()
        chunk: bytes = message.get("body", b"")
        if chunk:
            self._size += len(chunk)
            self._admit.received(self._size)
            cost = _COPIES * len(chunk) + (json_bytes_in_memory(chunk) if self._is_json else 0)
            self._admit.take(cost, self.counted)
            self.counted += cost
        return message


def _may_be_json(headers: Headers) -> bool:
    """Everything that is not surely something else, or raw tensors behind a short JSON part."""
    kind = headers.get("content-type", "")
    return not kind.startswith(_NO_JSON) and "inference-header-content-length" not in headers


def json_bytes_in_memory(text: bytes) -> int:
    """An upper estimate of what JSON takes once it is parsed, without its long strings."""
    if len(text) < _SHORT:
        lists, dicts, commas, colons = (text.count(sign) for sign in _SIGNS)
    else:  # numpy looks at many bytes at a time, bytes.count at one
        codes = np.frombuffer(text, np.uint8)
        lists, dicts, commas, colons = (int(np.count_nonzero(codes == sign[0])) for sign in _SIGNS)
    containers = BYTES_PER_LIST * lists + BYTES_PER_DICT * dicts
    return int(containers + BYTES_PER_VALUE * (commas + colons))
