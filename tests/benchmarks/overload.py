"""More requests than the service can answer: what is still answered, how fast the rest is refused.

    python tests/benchmarks/overload.py [--seconds 60] [--size 224]

Peak is what 32 connections in a closed loop get. Then requests arrive by a schedule of their own at
1, 2 and 5 times that, whether or not earlier ones were answered, and at 0.7 of it again; latencies
count from when a request was meant to be sent. Goals at 5 x: goodput >= 80 % of the peak, the rest
429 or 503 with Retry-After within 100 ms; afterwards normal within 10 s. ResNet-18 of random
weights, raw pixels, one thread for the encoder; the client shares the machine.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.wire import Connection, closed_loop, npy, request
from tests.faults.started import Started

CONNECTIONS = 32
NO_ANSWER_S = 40.0
say = sys.stdout.write


@dataclass
class Phase:
    """What came back from one stretch of time."""

    seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    good: list[tuple[float, float]] = field(default_factory=list)  # meant to be sent at, latency
    refused_s: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    late_s: float = 0.0  # the client's own delay, at most
    hung: int = 0

    @property
    def goodput(self) -> float:
        """Answers a second of the schedule."""
        return len(self.good) / self.seconds


def open_loop(port: int, wire: bytes, *, rate: float, seconds: float, seed: int = 0) -> Phase:
    """Send at random moments, `rate` a second on average; gives what came of each."""
    draw, phase = random.Random(seed), Phase(seconds)
    free: list[Connection] = []

    async def one(due: float, origin: float) -> None:
        phase.late_s = max(phase.late_s, time.perf_counter() - due)
        connection = free.pop() if free else await Connection.open(port)
        try:
            answer = await connection.ask(wire)
        except (ConnectionError, asyncio.IncompleteReadError):
            # It had been kept for longer than the service keeps them; every client does this.
            connection = await Connection.open(port)
            answer = await connection.ask(wire)
        took = time.perf_counter() - due
        phase.statuses[answer.status] += 1
        if answer.status == 200:
            phase.good.append((due - origin, took))
        else:
            phase.refused_s.append(took)
            phase.without_retry_after += b"retry-after:" not in answer.headers.lower()
        if b"connection: close" in answer.headers.lower():
            connection.close()
        else:
            free.append(connection)

    async def drive() -> None:
        origin = time.perf_counter()
        due, tasks = origin, []
        while (due := due + draw.expovariate(rate)) < origin + seconds:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(due, origin)))
        done, pending = await asyncio.wait(tasks, timeout=NO_ANSWER_S)
        phase.hung = len(pending)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
        for connection in free:
            connection.close()

    asyncio.run(drive())
    return phase


def main() -> None:
    # Here, because the short form in the tests needs no torch.
    from tests.benchmarks.served_models import photo, random_bundle

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    wire = request(npy(photo(0, options.size, options.size)[None]), "application/x-npy")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = random_bundle(folder, options.size, variants=())
        with Started(
            bundle, folder / "state", log=folder / "log", inference_threads=1, decoder_processes=1
        ) as service:
            closed_loop(service.port, [wire], connections=CONNECTIONS, seconds=2)
            full = closed_loop(service.port, [wire], connections=CONNECTIONS, seconds=10)
            peak = full.answers / full.seconds
            quiet = open_loop(service.port, wire, rate=0.7 * peak, seconds=10)
            quiet_ms = 1000 * float(np.percentile([t for _, t in quiet.good], 99))
            say(f"peak {peak:.1f}/s; at 0.7 of it p99 {quiet_ms:.0f} ms\n")
            for times in (1, 2, 5):
                cpu = service.cpu_s()
                phase = open_loop(
                    service.port, wire, rate=times * peak, seconds=options.seconds, seed=times
                )
                cpu = service.cpu_s() - cpu
                tell(f"{times} x", phase, peak, cpu)
                if times > 1:
                    after = open_loop(service.port, wire, rate=0.7 * peak, seconds=15)
                    tell("  then 0.7 x", after, peak, 0)
                    slow = [at for at, took in after.good if 1000 * took > 2 * quiet_ms]
                    last = max(slow, default=0.0)
                    say(f"  the last answer of over twice the quiet p99 was sent at {last:.1f} s\n")


def tell(name: str, phase: Phase, peak: float, cpu_s: float) -> None:
    latencies = np.asarray([took for _, took in phase.good]) * 1000
    refused = np.asarray(phase.refused_s or [0.0]) * 1000
    say(
        f"{name}: {dict(phase.statuses)}; goodput {phase.goodput:.1f}/s = "
        f"{phase.goodput / peak:.2f} of the peak, p50 {np.percentile(latencies, 50):.0f} ms, p99 "
        f"{np.percentile(latencies, 99):.0f} ms; refused p50 {np.percentile(refused, 50):.1f} ms, "
        f"p99 {np.percentile(refused, 99):.1f} ms, {phase.without_retry_after} without "
        f"Retry-After; hung {phase.hung}; client late by {1000 * phase.late_s:.0f} ms at most; "
        f"server {cpu_s:.1f} s of CPU\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
