"""Requests as bytes and clients that cost little, for the benchmarks of the service.

In: a port and ready-made requests. Out: answers and latencies. Connections are kept.
"""

import asyncio
import io
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


def npy(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def request(
    body: bytes, media_type: str, *, path: str = "/embed", accept: str | None = "application/x-npy"
) -> bytes:
    """A POST as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Type: {media_type}"]
    if accept:
        lines.append(f"Accept: {accept}")
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def form(body: bytes, name: str = "images") -> tuple[bytes, str]:
    """A multipart body with one file, and its media type."""
    head = (
        f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + body + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


class Answer(NamedTuple):
    """One answer."""

    status: int
    headers: bytes
    body: bytes


class Connection:
    """One kept connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, wire: bytes) -> Answer:
        self._writer.write(wire)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        place = lowered.find(b"content-length:")
        length = int(lowered[place + 15 : lowered.index(b"\r\n", place)]) if place > 0 else 0
        return Answer(int(head[9:12]), head, await self._reader.readexactly(length))

    def close(self) -> None:
        self._writer.close()


class Load(NamedTuple):
    """What a closed loop saw."""

    answers: int
    seconds: float
    latencies_s: NDArray[np.float64]

    def percentile_ms(self, percent: float) -> float:
        """Of the latencies."""
        return float(np.percentile(self.latencies_s, percent) * 1000)


def closed_loop(port: int, wires: Sequence[bytes], *, connections: int, seconds: float) -> Load:
    """Every connection asks again as soon as it is answered; anything but 200 is an error."""

    async def drive() -> Load:
        latencies: list[float] = []
        end = time.perf_counter() + seconds

        async def one(number: int) -> None:
            connection = await Connection.open(port)
            while (begun := time.perf_counter()) < end:
                answer = await connection.ask(wires[number % len(wires)])
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {answer.body[:300]!r}")
                latencies.append(time.perf_counter() - begun)
                number += connections
            connection.close()

        begun = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(connections)))
        return Load(len(latencies), time.perf_counter() - begun, np.asarray(latencies))

    return asyncio.run(drive())
