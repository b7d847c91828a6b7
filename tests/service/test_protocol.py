"""service.protocol over real sockets: the clock is the test's, nobody waits."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from service.metrics import Metrics
from service.protocol import LINGER_S, MIN_READER_BYTES_PER_S, BoundedConfig, Connections
from service.settings import Settings

HEAD = b"POST /x HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Clock:
    """A clock that only the test moves."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Bench:
    """A server with a small application and a clock by hand."""

    def __init__(self, app: Any, **options: Any) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        chosen = Settings.model_validate({"bundle": "b", "state": "s", **options})
        self.connections = Connections(chosen, self.metrics, clock=self.clock)
        config = BoundedConfig(app, self.connections, log_config=None, lifespan="off",
                               server_header=False, date_header=False)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._config = config

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bench"]:
        config, loop = self._config, asyncio.get_running_loop()
        config.load()
        server = await loop.create_server(
            lambda: config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self._server.server_state, app_state={}
            ),
            "127.0.0.1",
            0,
        )
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for connection in list(self.connections.open):
                connection.transport.abort()
            await asyncio.sleep(0)

    async def connect(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        await writer.drain()
        return reader, writer

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    def pass_time(self, seconds: float) -> None:
        self.clock.seconds += seconds
        self.connections.sweep()

    def closed(self, reason: str) -> float:
        name = "invprop_connections_closed_total"
        known = self.metrics.registry
        return known.get_sample_value(name, {"reason": reason}) or 0.0


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Read the body and answer its size."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await answer(send, 200, str(size).encode())


async def answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def problem_of(text: bytes) -> Any:
    head, _, body = text.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    assert b"nosniff" in head
    return json.loads(body)


def run(test: Callable[[Bench], Awaitable[None]], app: Any = echo, **options: Any) -> None:
    async def _run() -> None:
        async with Bench(app, **options).running() as bench:
            await test(bench)

    asyncio.run(_run())


@pytest.mark.parametrize("sent", [b"", b"GET /x HT", HEAD + b"X-Slow: 1\r\n", b"\r\n\r\n"])
def test_head__that_does_not_come_is_given_up(sent: bytes) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(sent)
        await bench.until(lambda: [c._unpaid for c in bench.connections.open] == [len(sent)])
        bench.pass_time(9.9)
        assert len(bench.connections.open) == 1
        bench.pass_time(0.1)
        found = problem_of(await reader.read())
        assert (found["status"], found["code"]) == (408, "request_timeout")
        assert (found["limit"], found["setting"]) == (10, "header_timeout_s")
        assert bench.closed("slow_head") == 1
        writer.close()

    run(test)


@pytest.mark.parametrize(
    "sent", [HEAD + b"Content-Length: 10\r\n\r\nabc", CHUNKED, CHUNKED + b"3\r\nabc\r\n"]
)
def test_body__that_does_not_come_is_given_up(sent: bytes) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(sent)
        await bench.until(lambda: bool(bench.connections.open) and not bench.connections.waiting)
        bench.pass_time(19.9)
        assert len(bench.connections.open) == 1
        bench.pass_time(0.1)
        found = problem_of(await reader.read())
        assert (found["status"], found["setting"]) == (408, "body_timeout_s")
        assert bench.closed("slow_body") == 1
        writer.close()

    run(test)


def test_requests__on_one_connection_have_a_deadline_each() -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect()
        for _ in range(5):
            bench.pass_time(9)
            writer.write(HEAD + b"Content-Length: 3\r\n\r\nabc")
            assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        writer.write(b"POST /x HT")
        await bench.until(lambda: any(c._deadline for c in bench.connections.open))
        bench.pass_time(10)
        assert problem_of(await reader.read())["setting"] == "header_timeout_s"
        writer.close()

    run(test)


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X-Long: " + b"x" * 300_000,
        HEAD + b"X-Many: x\r\n" * 30_000,
        b"GET /" + b"x" * 300_000,
        CHUNKED + b"1\r\na\r\n0\r\n" + b"X-Trailer: x\r\n" * 30_000,
        CHUNKED + b"1;" + b"x" * 300_000,
    ],
    ids=["long header", "many headers", "long URL", "trailers", "chunk extension"],
)
def test_head__has_a_size(sent: bytes) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect()
        with contextlib.suppress(ConnectionError):  # closed while it was still sending
            writer.write(sent)
            await writer.drain()
        await bench.until(lambda: bench.closed("too_large") + bench.closed("bad_request") == 1)
        assert not bench.connections.open
        writer.close()
        del reader

    run(test)


def test_head__that_is_too_large_is_told_so() -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(HEAD + b"X-Long: " + b"x" * 2000)
        found = problem_of(await reader.read())
        assert (found["code"], found["setting"]) == ("headers_too_large", "max_header_bytes")
        writer.close()

    run(test, max_header_bytes=1024)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET /x HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
        CHUNKED + b"zz\r\n",
        b"GET /\xc3\xbc HTTP/1.1\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\n\r\n",
    ],
)
def test_nonsense__is_answered_with_a_problem(sent: bytes) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(sent)
        found = problem_of(await reader.read())
        assert (found["status"], found["code"]) == (400, "bad_request")
        writer.close()

    run(test)


def test_connections__past_the_limit_displace_the_idle_ones() -> None:
    async def test(bench: Bench) -> None:
        idle = [await bench.connect() for _ in range(2)]
        await bench.until(lambda: len(bench.connections.open) == 2)
        reader, writer = await bench.connect(HEAD + b"Content-Length: 3\r\n\r\nabc")
        assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        assert await idle[0][0].read() == b""  # the oldest one was closed
        assert bench.closed("displaced") == 1
        for _, each in [*idle, (reader, writer)]:
            each.close()

    run(test, max_connections=2)


def test_connections__past_the_limit_are_refused_when_all_are_busy() -> None:
    async def test(bench: Bench) -> None:
        busy = await bench.connect(HEAD + b"Content-Length: 3\r\n\r\n")
        await bench.until(lambda: bool(bench.connections.open) and not bench.connections.waiting)
        reader, writer = await bench.connect(b"GET /x HTTP/1.1\r\n\r\n")
        found = problem_of(await reader.read())
        assert (found["status"], found["code"]) == (503, "overloaded")
        assert (found["limit"], found["setting"]) == (1, "max_connections")
        writer.close()
        busy[1].write(b"abc")
        assert (await busy[0].readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        busy[1].close()

    run(test, max_connections=1)


def test_early_answer__arrives_before_the_rest_of_the_body_is_cut() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 413, b"too much")

    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(CHUNKED + b"3\r\nabc\r\n")
        assert (await reader.readuntil(b"too much")).startswith(b"HTTP/1.1 413")
        writer.write(b"3\r\nabc\r\n" * 1000)
        await writer.drain()
        assert len(bench.connections.open) == 1
        bench.pass_time(LINGER_S)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        assert not bench.connections.open
        writer.close()

    run(test, app=refuse)


def test_reader__that_does_not_read_is_closed_and_a_slow_one_is_not() -> None:
    size = 30_000_000

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 200, b"x" * size)

    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(b"GET /x HTTP/1.1\r\n\r\n")
        await bench.until(lambda: any(c._reader for c in bench.connections.open))
        (connection,) = bench.connections.open
        while connection._reader is not None:  # it reads, a little more than it must
            before = connection.transport.get_write_buffer_size()
            wanted = 20 * MIN_READER_BYTES_PER_S
            while before - connection.transport.get_write_buffer_size() < wanted:
                if not await reader.read(wanted) or connection._reader is None:
                    break
                await asyncio.sleep(0)
            bench.pass_time(20)
            assert len(bench.connections.open) == 1
        writer.close()

        reader, writer = await bench.connect(b"GET /x HTTP/1.1\r\n\r\n")
        await bench.until(lambda: any(c._reader for c in bench.connections.open))
        bench.pass_time(20)
        assert bench.closed("slow_reader") == 1
        writer.close()

    run(test, app=large)


def test_requests__sent_ahead_are_bounded() -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await bench.connect(b"GET /x HTTP/1.1\r\n\r\n" * 10)
        for _ in range(10):
            await reader.readuntil(b"\r\n\r\n0")
        writer.close()
        _, writer = await bench.connect(b"GET /x HTTP/1.1\r\n\r\n" * 1000)
        await bench.until(lambda: bench.closed("bad_request") == 1)
        writer.close()

    run(test)


def test_100_continue__is_not_said_to_what_is_refused() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/refused":
            await answer(send, 413, b"no")
        else:
            await echo(scope, receive, send)

    async def test(bench: Bench) -> None:
        rest = b" HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        reader, writer = await bench.connect(b"POST /refused" + rest)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413")
        writer.close()
        reader, writer = await bench.connect(b"POST /x" + rest)
        assert (await reader.readuntil(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        await reader.readuntil(b"\r\n\r\n3")
        writer.close()

    run(test, app=refuse)
