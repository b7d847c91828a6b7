"""A service by hand: answers written in the test, one suite for Client and AsyncClient."""

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from client import AsyncClient, Client
from client.retry import Clock
from client.version import VERSION

LIMITS = {
    "max_body_bytes": 10_000_000,
    "max_images": 256,
    "max_rows": 10_000,
    "max_results": 500_000,
    "max_group_walk": 20_000,
}

Handler = Callable[[httpx2.Request], httpx2.Response]


class FakeTime:
    """A clock that only waiting moves, and dice that always show the highest."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.seconds += seconds

    async def wait_async(self, seconds: float) -> None:
        self.wait(seconds)

    def clock(self) -> Clock:
        return Clock(
            monotonic=lambda: self.seconds,
            now=lambda: 1_700_000_000.0,  # Tue, 14 Nov 2023 22:13:20 GMT
            uniform=lambda _, high: high,
            sleep=self.wait,
            sleep_async=self.wait_async,
        )


class FakeService:
    """Answers by (method, path); records what was asked."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []
        self.limits = dict(LIMITS)
        self.version = lambda: 7  # of the gallery
        self.versions = {"invprop": VERSION}
        self.time = FakeTime()
        self._handlers: dict[tuple[str, str], Handler] = {("GET", "/info"): self.info}

    def on(self, method: str, path: str, handler: Handler | httpx2.Response) -> None:
        if isinstance(handler, httpx2.Response):
            content, status, headers = handler.content, handler.status_code, handler.headers
            # A fresh one each time: a response can be read once.
            self._handlers[method, path] = lambda _: httpx2.Response(
                status, headers=headers, content=content
            )
        else:
            self._handlers[method, path] = handler

    def asked(self, path: str) -> list[httpx2.Request]:
        return [request for request in self.requests if request.url.path == path]

    def bodies(self, path: str) -> list[Any]:
        return [json.loads(request.content) for request in self.asked(path)]

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self._handlers[request.method, request.url.path](request)

    def info(self, _: httpx2.Request) -> httpx2.Response:
        limits = {name: {"limit": value, "setting": name} for name, value in self.limits.items()}
        return httpx2.Response(
            200,
            json={
                "model": "m1",
                "gallery_version": self.version(),
                "dims": {"embedding": 2, "features": 3},
                "input": {"size_px": 8},
                "training": None,
                "parity": None,
                "execution_provider": "CPUExecutionProvider",
                "precision": "int8",
                "variants": {"int8": {"file": "encoder.int8.onnx"}},
                "speed": None,
                "search": {"index": "flat"},
                "gallery": {"items": 5},
                "limits": limits,
                "versions": dict(self.versions),
            },
        )


class Waited:
    """An AsyncClient whose every call is waited for, so that one test serves both clients."""

    def __init__(self, client: Any) -> None:  # AsyncClient or its evaluations
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name == "evaluations":
            return Waited(method)

        def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if inspect.isasyncgen(result):
                return iter(asyncio.run(_collected(result)))
            return asyncio.run(result)

        return call


async def _collected(values: Any) -> list[Any]:
    return [value async for value in values]


@pytest.fixture
def fake() -> FakeService:
    return FakeService()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, fake: FakeService) -> Iterator[Callable[..., Any]]:
    """Makes a client of the fake service; every test that uses it runs for both clients."""
    clients: list[Any] = []

    def make(base_url: str = "http://fake", **options: Any) -> Any:
        options = {
            "clock": fake.time.clock(),
            "transport": httpx2.MockTransport(fake),
            "concurrency": 1,  # so that requests come in the order of the call
        } | options
        made: Any = Client(base_url, **options)
        if request.param == "async":
            made = Waited(AsyncClient(base_url, **options))
        clients.append(made)
        return made

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def service(connect: Callable[..., Any]) -> Any:
    return connect()
