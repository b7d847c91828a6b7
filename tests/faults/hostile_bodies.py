"""Hostile requests over real HTTP beside an honest client: seeded, thousands of them.

    python tests/faults/hostile_bodies.py --requests 3000 --seed 1

Asserts: no answer is a 5xx, each comes or the connection is closed within 3 s, the honest client
gets every answer and the right one, and the service with its decoders never takes more than 512 MiB
over what it took before. Prints what was seen; the seed repeats it.
"""

import argparse
import contextlib
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.fuzzed_bodies import TEXT, Hostile
from tests.faults.fuzzed_requests import MIB, generate
from tests.faults.served import Served
from tests.service.conftest import build_bundle

ANSWER_S = 3.0
SILENT_S = 40.0  # past every deadline of the service: it is not coming
RSS_BYTES = 512 * 2**20
SENDERS = 6
SAMPLE_S = 0.05
UNENDING = ("wire", "large")  # may promise more than they send: half-closed, as if they had crashed
HONEST = "train/0030.png"  # an item that no hostile request names, and so deletes


@dataclass
class Seen:
    """What happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)  # answered, but later than ANSWER_S
    slowest_s: float = 0.0
    honest: int = 0
    honest_refused: int = 0
    honest_s: list[float] = field(default_factory=list)
    rss_before: int = 0
    rss_most: int = 0


def send(address: tuple[str, int], hostile: Hostile) -> tuple[str, float]:
    """Send one; gives the status, or `closed`, and the seconds from its last byte."""
    with socket.create_connection(address, timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # refused while it was still sending
            for piece in hostile.pieces:
                connection.sendall(piece)
            if hostile.kind in UNENDING:
                connection.shutdown(socket.SHUT_WR)
        started = time.perf_counter()
        connection.settimeout(SILENT_S)
        received = b""
        try:
            while b"\r\n" not in received or received.startswith(b"HTTP/1.1 100"):
                piece = connection.recv(65_536)
                if not piece:
                    break
                received += piece
                received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        except ConnectionError:
            received = b""
        except TimeoutError:
            return "silent", time.perf_counter() - started
        waited = time.perf_counter() - started
    words = received.split(b" ", 2)
    return (words[1].decode() if len(words) > 1 else "closed"), waited


def run(requests: Sequence[Hostile], folder: Path, **flags: object) -> Seen:
    """Send all of them to a service of its own, beside an honest client."""
    bundle = build_bundle(folder / "bundle")
    service = Served(bundle, folder / "state", log=folder / "log", log_level="warning", **flags)
    seen, done = Seen(), threading.Event()
    try:
        service.start()
        at = urlsplit(service.url)
        assert at.hostname is not None
        assert at.port is not None
        address = (at.hostname, at.port)
        honest_answers(service, seen, 3)
        process = psutil.Process(service.pid)
        seen.rss_before = seen.rss_most = resident(process)
        waiting = list(enumerate(requests))[::-1]

        def sender() -> None:
            while waiting:
                with contextlib.suppress(IndexError):
                    number, hostile = waiting.pop()
                    status, waited_s = send(address, hostile)
                    seen.statuses[status] += 1
                    seen.slowest_s = max(seen.slowest_s, waited_s)
                    head = b"".join(p[:300] for p in hostile.pieces[:3])[:500]
                    said = f"{number} {hostile.kind}: {status} after {waited_s:.1f} s: {head!r}"
                    if status.startswith("5") or status == "silent":
                        seen.wrong.append(said)
                    elif waited_s > ANSWER_S:
                        seen.slow.append(said)

        def sampler() -> None:
            while not done.wait(SAMPLE_S):
                seen.rss_most = max(seen.rss_most, resident(process))

        def honest() -> None:
            while not done.is_set():
                honest_answers(service, seen, 1)

        workers = [threading.Thread(target=sender) for _ in range(SENDERS)]
        beside = [threading.Thread(target=each) for each in (sampler, honest)]
        for thread in (*workers, *beside):
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        for thread in beside:
            thread.join()
        logged = service.said()
        if "Traceback" in logged or "unexpected_error" in logged:
            seen.wrong.append(f"the log has a defect: {logged[-4000:]}")
        if service.stop() != 0:
            seen.wrong.append(f"it ended with {service.code}")
    finally:
        if not service.ended():
            service.kill()
    return seen


def resident(process: psutil.Process) -> int:
    """Bytes of the service and its decoders."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def honest_answers(service: Served, seen: Seen, times: int) -> None:
    """Ask as a client would, and know the answers; a 429 is obeyed as a client would."""
    connection = service.connect()
    for _ in range(times):
        for path, body, wanted in (
            ("/neighbours", {"ids": [HONEST], "k": 5}, 5),
            ("/embed", {"images": [TEXT]}, 12),
        ):
            started = time.perf_counter()
            answer = connection.ask("POST", path, body)
            seen.honest += 1
            seen.honest_s.append(time.perf_counter() - started)
            if answer.status == 429:
                seen.honest_refused += 1
                time.sleep(float(answer.headers["retry-after"]))
                continue
            document = answer.json()
            rows = document.get("results") or document.get("embeddings")
            if answer.status != 200 or len(rows[0]) != wanted:
                seen.wrong.append(f"honest: {answer.status} {answer.body[:200]!r}")


def check(seen: Seen) -> None:
    """Raise where a promise was broken, but for times: they are the machine's too."""
    assert not seen.wrong, "\n".join(seen.wrong[:40])
    grown = seen.rss_most - seen.rss_before
    assert grown <= RSS_BYTES, f"resident memory grew by {grown / MIB:.0f} MiB"


def report(seen: Seen, seed: int) -> str:
    """What was seen, as text."""
    times = sorted(seen.honest_s)
    return (
        f"seed {seed}: {sum(seen.statuses.values())} requests: "
        f"{dict(sorted(seen.statuses.items()))}; slowest {seen.slowest_s:.2f} s, {len(seen.slow)} "
        f"over {ANSWER_S:g} s; honest "
        f"{seen.honest} ({seen.honest_refused} refused with Retry-After), median "
        f"{times[len(times) // 2] * 1000:.1f} ms, worst {times[-1] * 1000:.0f} ms; resident "
        f"{seen.rss_before / MIB:.0f} MiB before, {seen.rss_most / MIB:.0f} MiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answer-s", type=float, default=ANSWER_S)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(generate(given.seed, given.requests), Path(folder))
    sys.stdout.write(report(seen, given.seed) + "\n")
    check(seen)
    assert seen.slowest_s <= given.answer_s, "\n".join(seen.slow[:40])


if __name__ == "__main__":
    main()
