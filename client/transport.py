"""The only module that knows the HTTP library. In: an attempt to send. Out: its answer, or the
library's exceptions as ConnectionFailed. `run` drives the steps of client.retry, blocking or not.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import httpx2

from client.errors import ConnectionFailed, InvpropError, TimedOut, UnexpectedAnswer, problem
from client.parallel import Parallel, Part, Stopped
from client.retry import Answer, Attempt, Clock, Steps, Together, Wait

Transport: TypeAlias = httpx2.BaseTransport
AsyncTransport: TypeAlias = httpx2.AsyncBaseTransport

Result = TypeVar("Result")
Outcome: TypeAlias = Answer | BaseException | None


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

    def run(self, steps: Steps[Result], *, stop: threading.Event | None = None) -> Result:
        """Do what the steps ask for until they end.

        Args:
            stop: set when the result is not wanted any more; looked at between two effects.
        """
        effect = _advance(steps, None)
        while not isinstance(effect, _Done):
            if stop is not None and stop.is_set():
                steps.close()
                raise Stopped
            outcome: Outcome = None
            if isinstance(effect, Wait):
                self._clock.sleep(effect.seconds)
            elif isinstance(effect, Together):
                outcome = self._together(effect)
            else:
                outcome = self._send(effect)
            effect = _advance(steps, outcome)
        return effect.result

    def events(self, attempt: Attempt) -> Iterator[str]:
        """The data of server-sent events as they come, until the service ends the stream."""
        with _failing_as_ours(attempt), self._http.sse(**_arguments(attempt)) as source:
            if source.response.status_code >= 400:
                source.response.read()
            _check_stream(source.response, self._clock)
            for event in source:
                yield event.data

    def _together(self, together: Together) -> BaseException | None:
        """Run the parts, each on a thread of its own; the failure of the first one that failed."""
        parts, ends = Parallel(together), queue.SimpleQueue[tuple[Part, BaseException | None]]()
        stop = threading.Event()

        def work(part: Part) -> None:
            try:
                self.run(part.make(), stop=stop)
            except BaseException as error:  # noqa: BLE001 - a thread's door: raised by the caller
                ends.put((part, error))
            else:
                ends.put((part, None))

        def start(part: Part) -> None:
            if together.at_once == 1:
                work(part)
            else:  # a daemon, so that Ctrl-C does not wait for answers
                threading.Thread(target=work, args=(part,), daemon=True).start()

        try:
            first, second = parts.draw(), parts.draw()
            if first is not None and second is None:
                work(first)  # nothing to do beside it: no thread
            else:
                for part in filter(None, (first, second)):
                    start(part)
            while True:
                while (following := parts.draw()) is not None:
                    start(following)
                if not parts.flying:
                    break
                parts.ended(*ends.get())
                if parts.failure is not None:
                    stop.set()
        except BaseException:
            stop.set()
            raise
        return parts.failure

    def _send(self, attempt: Attempt) -> Outcome:
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
            outcome: Outcome = None
            if isinstance(effect, Wait):
                await self._clock.sleep_async(effect.seconds)
            elif isinstance(effect, Together):
                outcome = await self._together(effect)
            else:
                outcome = await self._send(effect)
            effect = await asyncio.to_thread(_advance, steps, outcome)
        return effect.result

    async def events(self, attempt: Attempt) -> AsyncIterator[str]:
        """The data of server-sent events as they come, until the service ends the stream."""
        with _failing_as_ours(attempt):
            async with self._http.sse(**_arguments(attempt)) as source:
                if source.response.status_code >= 400:
                    await source.response.aread()
                _check_stream(source.response, self._clock)
                async for event in source:
                    yield event.data

    async def _together(self, together: Together) -> BaseException | None:
        """Run the parts, each as a task; the failure of the first one that failed."""
        parts = Parallel(together)
        tasks: dict[asyncio.Task[None], Part] = {}
        try:
            while True:
                while (part := await asyncio.to_thread(parts.draw)) is not None:
                    tasks[asyncio.create_task(self.run(part.make()))] = part
                if not tasks:
                    return parts.failure
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    part = tasks.pop(task)
                    parts.ended(part, Stopped() if task.cancelled() else task.exception())
                if parts.failure is not None:
                    for task in tasks:
                        task.cancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, attempt: Attempt) -> Outcome:
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


def public_url(base_url: str) -> str:
    """The URL without user and password, to be written down."""
    url = httpx2.URL(checked_url(base_url)).copy_with(username=None, password=None)
    return str(url).rstrip("/")


def _advance(steps: Steps[Result], outcome: Outcome) -> Attempt | Wait | Together | _Done[Result]:
    """Run the steps up to their next effect."""
    try:
        if isinstance(outcome, BaseException):
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


def _check_stream(response: httpx2.Response, clock: Clock) -> None:
    """Raise what the service answers instead of a stream; an error's body has been read."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    if response.status_code >= 400:
        raise problem(response.status_code, headers, response.content, now=clock.now())
    if not headers.get("content-type", "").startswith("text/event-stream"):
        raise UnexpectedAnswer(
            f"wanted server-sent events from {response.request.url}, got "
            f"{headers.get('content-type')!r}: is the URL right?"
        )


@contextmanager
def _failing_as_ours(attempt: Attempt) -> Iterator[None]:
    try:
        yield
    except httpx2.RequestError as error:
        raise _failure(error, attempt) from error


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
