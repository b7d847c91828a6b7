"""The only module that knows the HTTP library. In: an attempt to send. Out: its answer, or the
library's exceptions as ConnectionFailed. `run` and `run_async` drive the steps of client.retry.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import httpx2

from client.errors import ConnectionFailed, InvpropError, TimedOut, UnexpectedAnswer
from client.retry import Answer, Attempt, Clock, Steps, Wait

Transport: TypeAlias = httpx2.BaseTransport
AsyncTransport: TypeAlias = httpx2.AsyncBaseTransport

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Done(Generic[Result]):
    result: Result


class Connection:
    """Connections to one service, blocking."""

    def __init__(
        self, base_url: str, headers: Mapping[str, str], transport: Transport | None, clock: Clock
    ) -> None:
        self._http = httpx2.Client(
            base_url=checked_url(base_url), headers=dict(headers), transport=transport
        )
        self._clock = clock

    def run(self, steps: Steps[Result]) -> Result:
        """Do what the steps ask for until they end."""
        effect = _advance(steps, None)
        while not isinstance(effect, _Done):
            outcome: Answer | InvpropError | None = None
            if isinstance(effect, Wait):
                self._clock.sleep(effect.seconds)
            else:
                outcome = self._send(effect)
            effect = _advance(steps, outcome)
        return effect.result

    def _send(self, attempt: Attempt) -> Answer | InvpropError:
        try:
            return _answer(self._http.request(**_arguments(attempt)))
        except httpx2.RequestError as error:
            return _failure(error, attempt)

    def close(self) -> None:
        self._http.close()


class AsyncConnection:
    """Connections to one service, for asyncio.

    Reading and encoding pictures, the work between two requests, runs in a thread: the event loop
    stays free.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        transport: AsyncTransport | None,
        clock: Clock,
    ) -> None:
        self._http = httpx2.AsyncClient(
            base_url=checked_url(base_url), headers=dict(headers), transport=transport
        )
        self._clock = clock

    async def run(self, steps: Steps[Result]) -> Result:
        """Do what the steps ask for until they end."""
        effect = await asyncio.to_thread(_advance, steps, None)
        while not isinstance(effect, _Done):
            outcome: Answer | InvpropError | None = None
            if isinstance(effect, Wait):
                await self._clock.sleep_async(effect.seconds)
            else:
                outcome = await self._send(effect)
            effect = await asyncio.to_thread(_advance, steps, outcome)
        return effect.result

    async def _send(self, attempt: Attempt) -> Answer | InvpropError:
        try:
            return _answer(await self._http.request(**_arguments(attempt)))
        except httpx2.RequestError as error:
            return _failure(error, attempt)

    async def close(self) -> None:
        await self._http.aclose()


def checked_url(base_url: str) -> str:
    """The URL of a service; a path in it is a prefix of every route.

    Raises:
        ValueError: not http:// or https://, or no host.
    """
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{base_url!r} is no URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"wanted a URL like http://127.0.0.1:8000, got {base_url!r}")
    return base_url


def _advance(
    steps: Steps[Result], outcome: Answer | InvpropError | None
) -> Attempt | Wait | _Done[Result]:
    """Run the steps up to their next effect."""
    try:
        if isinstance(outcome, InvpropError):
            return steps.throw(outcome)
        return steps.send(outcome)
    except StopIteration as stop:
        return _Done(stop.value)


def _arguments(attempt: Attempt) -> dict[str, Any]:
    request = attempt.request
    return {
        "method": request.route.method,
        "url": request.path,
        "params": dict(request.query) or None,
        "headers": dict(request.headers),
        "content": request.body or None,
        "timeout": attempt.timeout_s,
    }


def _answer(response: httpx2.Response) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status_code, headers, response.content)


def _failure(error: httpx2.RequestError, attempt: Attempt) -> InvpropError:
    request = attempt.request
    what = f"{request.route.method} {error.request.url}"
    if isinstance(error, httpx2.TimeoutException):
        failure: InvpropError = TimedOut(f"{what}: silent for {attempt.timeout_s:.3g} s")
    elif isinstance(error, httpx2.TransportError):
        failure = ConnectionFailed(f"{what}: {error or type(error).__name__}")
    else:
        failure = UnexpectedAnswer(f"{what}: {error}")
    failure.__cause__ = error
    return failure
