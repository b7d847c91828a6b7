#!/usr/bin/env python3
"""Callers of the stack: those who add, those who ask for evaluations, those who dawdle.

Run: python tests/deploy/load.py slow PORT HEADS BODIES   until SIGTERM: sockets that trickle
     python tests/deploy/load.py post|get PORT ID SECONDS THREADS   searches by id, or looks at the
     item; prints how many were answered, how many failed, and the CPU seconds of this caller
"""

import asyncio
import contextlib
import http.client
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator

from stack import ENDED, Stack, query


class Writers:
    """Adds pictures one after the other, and remembers which were answered."""

    def __init__(self, stack: Stack, name: str, threads: int = 2) -> None:
        self.acknowledged: list[str] = []
        self.refused: dict[str, int] = {}
        self._stack, self._name = stack, name
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(threads)]

    def __enter__(self) -> "Writers":
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for each in self._threads:
            each.join()

    def _write(self, number: int) -> None:
        count = 0
        while not self._ends.is_set():
            count += 1
            name = f"{self._name}-{number}-{count}.png"
            try:
                answer = self._stack.add(name, self._name)
                if answer["added"] + answer["updated"] == 1:
                    self.acknowledged.append(name)
                time.sleep(0.05)  # what is added is compared, embedded again and backed up later
            except (OSError, ValueError, http.client.HTTPException) as error:
                why = str(error.code) if isinstance(error, urllib.error.HTTPError) else "no answer"
                self.refused[why] = self.refused.get(why, 0) + 1
                time.sleep(0.2)


class Evaluators:
    """Asks for an evaluation every two seconds, and remembers which were accepted."""

    def __init__(self, stack: Stack, most: int = 3) -> None:
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self._stack, self._most = stack, most
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Evaluators":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def until_running(self, limit_s: float = 60.0) -> None:
        """Wait until one is being worked on, if there is a worker."""
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            with contextlib.suppress(OSError, ValueError):
                states = [
                    self._stack.ask("GET", f"/evaluations/{each}")["status"]
                    for each in self.accepted
                ]
                if "running" in states or (len(states) == self._most and set(states) <= set(ENDED)):
                    return
            time.sleep(0.2)

    def _ask(self) -> None:
        while not self._ends.is_set() and len(self.accepted) < self._most:
            try:
                self.accepted.append(self._stack.evaluate(len(self.accepted)))
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.refused.append(str(error))
            self._ends.wait(2)


@contextlib.contextmanager
def slow_sockets(port: int, heads: int, bodies: int) -> Iterator[None]:
    """So many sockets that never finish their request, in a process of their own."""
    words = [sys.executable, __file__, "slow", str(port), str(heads), str(bodies)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()  # all were opened once
        try:
            yield
        finally:
            child.terminate()


def searches(
    port: int, item: str, *, seconds: float, threads: int, how: str = "post"
) -> tuple[int, int, float]:
    """Searches that were answered, those that failed, CPU seconds of the process that asked."""
    words = [sys.executable, __file__, how, str(port), item, str(seconds), str(threads)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return int(said[0]), int(said[1]), float(said[2])


async def _dawdle(port: int, heads: int, bodies: int) -> None:
    opened = 0

    async def trickle(head: bytes) -> None:
        nonlocal opened
        first = True
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head)
                await writer.drain()
                opened += first
                first = False
                while not reader.at_eof():
                    await asyncio.sleep(2)
                    writer.write(b"x")
                    await writer.drain()
                writer.close()
            except OSError:
                await asyncio.sleep(0.5)

    start = b"POST /embed HTTP/1.1\r\nHost: here\r\n"
    whole = start + b"Content-Type: image/png\r\nContent-Length: 1000000\r\n\r\n"
    tasks = [asyncio.create_task(trickle(start + b"X-Slow: ")) for _ in range(heads)]
    tasks += [asyncio.create_task(trickle(whole)) for _ in range(bodies)]
    while opened < heads + bodies:
        await asyncio.sleep(0.1)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    await asyncio.gather(*tasks)


def _search(how: str, port: int, item: str, seconds: float, threads: int) -> None:
    ends = time.monotonic() + seconds
    counts = [[0, 0] for _ in range(threads)]
    body = query(item)

    def ask(count: list[int]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=35)
        while time.monotonic() < ends:
            try:
                if how == "post":
                    kind = {"Content-Type": "application/json"}
                    connection.request("POST", "/neighbours", body, kind)
                else:
                    connection.request("GET", f"/items/{item}")
                answer = connection.getresponse()
                answer.read()
                count[answer.status != 200] += 1
            except (OSError, http.client.HTTPException):
                count[1] += 1
                connection.close()

    callers = [threading.Thread(target=ask, args=(count,)) for count in counts]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    done, failed = (sum(count[n] for count in counts) for n in (0, 1))
    sys.stdout.write(f"{done} {failed} {time.process_time():.2f}\n")


if __name__ == "__main__":
    if sys.argv[1] == "slow":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(_dawdle(*map(int, sys.argv[2:5])))
    else:
        _search(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
