"""Hundreds of sockets that send a byte now and then, beside an honest client.

    python tests/faults/slow_senders.py --sockets 500

A third each: silent, a head that trickles, a body that trickles. (A client that does not read its
answer is tested in tests/service/test_protocol.py: a large answer costs time for itself.)
Asserts: the honest client gets every answer, the service closes every slow socket within 30 s.
Prints the honest client's times with and without them.
"""

import argparse
import asyncio
import contextlib
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.served import Served
from tests.service.conftest import build_bundle

CLOSED_S = 30.0
TRICKLE_S = 0.5
QUIET_S = 5.0
KINDS = ("silent", "head", "body")


@dataclass
class Seen:
    """What happened."""

    quiet_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    closed_after_s: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    still_open: int = 0


def run(sockets: int, folder: Path, **flags: object) -> Seen:
    """Measure the honest client alone, then beside the slow sockets until all are closed."""
    service = Served(build_bundle(folder / "bundle"), folder / "state", log=folder / "log",
                     log_level="warning", **flags)  # fmt: skip
    seen = Seen()
    try:
        service.start()
        ask_for(service, QUIET_S / 5, [], seen)  # warm
        ask_for(service, QUIET_S, seen.quiet_s, seen)
        done = threading.Event()
        honest = threading.Thread(target=lambda: ask_until(service, done, seen))
        honest.start()
        try:
            asyncio.run(all_slow(service.url, sockets, seen))
        finally:
            done.set()
            honest.join()
        assert service.stop() == 0
    finally:
        if not service.ended():
            service.kill()
    return seen


def ask_for(service: Served, seconds: float, times: list[float], seen: Seen) -> None:
    """Ask, one after the other, for so long."""
    connection, end = service.connect(), time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        try:
            answer = connection.ask("POST", "/neighbours", {"ids": ["train/0001.png"], "k": 5})
        except OSError as error:
            seen.failures.append(repr(error))
            continue
        times.append(time.perf_counter() - started)
        if answer.status != 200:
            seen.failures.append(f"{answer.status} {answer.body[:200]!r}")
    connection.close()


def ask_until(service: Served, done: threading.Event, seen: Seen) -> None:
    while not done.is_set():
        ask_for(service, 0.2, seen.beside_s, seen)  # new connections too


async def all_slow(url: str, sockets: int, seen: Seen) -> None:
    at = urlsplit(url)
    tasks = []
    for number in range(sockets):
        kind = KINDS[number % 3]
        tasks.append(asyncio.create_task(slow(at.hostname or "", at.port or 0, kind, seen)))
    _, pending = await asyncio.wait(tasks, timeout=CLOSED_S + 10)
    seen.still_open = len(pending)
    for task in pending:
        task.cancel()


async def slow(host: str, port: int, kind: str, seen: Seen) -> None:
    """One socket; returns when the service has closed it."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    started = time.perf_counter()
    with connection, contextlib.suppress(ConnectionError):
        await loop.sock_connect(connection, (host, port))
        head = b"POST /neighbours HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if kind == "head":
            await loop.sock_sendall(connection, head)
        elif kind == "body":
            await loop.sock_sendall(connection, head + b"Content-Length: 5000\r\n\r\n")
        while True:
            if kind in ("head", "body"):
                await loop.sock_sendall(connection, b"x")
            if await received_end(loop, connection):
                break
            await asyncio.sleep(TRICKLE_S)
    seen.closed_after_s[kind].append(time.perf_counter() - started)


async def received_end(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bool:
    """Whether the service has closed the connection, looked at for a moment."""
    try:
        async with asyncio.timeout(0.01):
            return await loop.sock_recv(connection, 4096) == b""
    except TimeoutError:
        return False


def check(seen: Seen) -> None:
    """Raise where a promise was broken."""
    assert not seen.failures, seen.failures[:10]
    assert seen.still_open == 0, f"{seen.still_open} slow sockets are still open"
    latest = max(max(times, default=0.0) for times in seen.closed_after_s.values())
    assert latest <= CLOSED_S, f"a slow socket was closed after {latest:.1f} s"


def report(seen: Seen) -> str:
    """What was seen, as text."""

    def shares(times: list[float]) -> str:
        ordered = sorted(times)
        p50, p99 = (ordered[int(len(ordered) * q)] * 1000 for q in (0.5, 0.99))
        return f"{len(ordered)} answers, p50 {p50:.1f} ms, p99 {p99:.1f} ms"

    closed = "; ".join(
        f"{kind} {len(times)} closed after {min(times):.1f} to {max(times):.1f} s"
        for kind, times in seen.closed_after_s.items()
        if times
    )
    return (
        f"honest, quiet: {shares(seen.quiet_s)}; beside: {shares(seen.beside_s)}; failures "
        f"{len(seen.failures)}; {closed}; still open {seen.still_open}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--timeouts-s", type=float, help="of head and body; the service's own")
    given = parser.parse_args()
    flags = {}
    if given.timeouts_s is not None:
        flags = dict.fromkeys(("header_timeout_s", "body_timeout_s"), given.timeouts_s)
    with tempfile.TemporaryDirectory() as folder:
        seen = run(given.sockets, Path(folder), **flags)
    sys.stdout.write(report(seen) + "\n")
    check(seen)


if __name__ == "__main__":
    main()
