"""A service that is sent pictures made to do harm (fuzzed_images.py), and an honest client beside.

    python tests/faults/hostile_images.py --images 10000 --seed 0

starts the service in a process of its own, sends the hostile ones over several connections with an
honest client beside them, and prints what came back. Fails (exit 1) unless there was no 5xx, no
honest failure, no answer after more than 3 s and no more than 512 MiB above the idle service and
its children.
"""

import argparse
import http.client
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.fuzzed_images import hostile_pictures
from tests.faults.started import Started
from tests.service.conftest import build_bundle, encoded

CONNECTIONS = 4
SLOWEST_S = 3.0
MOST_BYTES = 512 * 2**20


@dataclass
class Figures:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # what must never happen, in words
    slowest_s: float = 0.0
    slowest: str = ""
    honest: int = 0
    honest_s: list[float] = field(default_factory=list)
    grown_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        honest = sorted(self.honest_s)
        return (
            f"{sum(self.statuses.values())} hostile pictures in {self.seconds:.0f} s: "
            f"{dict(sorted(self.statuses.items()))}; slowest {self.slowest_s:.2f} s "
            f"({self.slowest}); {self.honest} honest, "
            f"p50 {1000 * honest[len(honest) // 2]:.1f} ms, "
            f"p99 {1000 * honest[len(honest) * 99 // 100]:.0f} ms, slowest {honest[-1]:.2f} s; "
            f"memory + {self.grown_bytes / 2**20:.0f} MiB; {len(self.failures)} failures"
        )


def attack(
    folder: Path, *, images: int, seed: int, connections: int = CONNECTIONS, **settings: object
) -> Figures:
    """Send so many hostile pictures to a service; an honest client asks all the while."""
    bundle = build_bundle(folder / "bundle")
    figures, lock = Figures(), threading.Lock()
    source = itertools.islice(hostile_pictures(seed), images)
    done = threading.Event()
    with Started(bundle, folder / "state", log=folder / "log", **settings) as service:

        def fail(text: str) -> None:
            with lock:
                figures.failures.append(text)

        def be_hostile() -> None:
            while True:
                with lock:
                    picture = next(source, None)
                if picture is None:
                    return
                begun = time.monotonic()
                try:
                    status, answer = post(service.port, picture.content, picture.media_type)
                except (OSError, http.client.HTTPException) as error:
                    fail(f"{picture.name}: no answer ({error!r})")
                    continue
                took = time.monotonic() - begun
                with lock:
                    figures.statuses[status] += 1
                    if took > figures.slowest_s:
                        figures.slowest_s, figures.slowest = took, picture.name
                if status >= 500:
                    fail(f"{picture.name}: {status} {answer[:200]!r}")

        honest_image = encoded(77, size=(400, 300), format="JPEG")

        def be_honest(expected: bytes) -> None:
            while not done.is_set():
                begun = time.monotonic()
                try:
                    status, answer = post(service.port, honest_image, "image/jpeg")
                except (OSError, http.client.HTTPException) as error:
                    fail(f"honest: no answer ({error!r})")
                    continue
                figures.honest += 1
                figures.honest_s.append(time.monotonic() - begun)
                if status != 200 or answer != expected:
                    fail(f"honest: {status} {answer[:200]!r}")
                done.wait(0.02)

        expected = post(service.port, honest_image, "image/jpeg")[1]
        idle_bytes = service.resident_bytes()
        service.watch_memory()
        begun = time.monotonic()
        honest = threading.Thread(target=be_honest, args=(expected,))
        honest.start()
        senders = [threading.Thread(target=be_hostile) for _ in range(connections)]
        for thread in senders:
            thread.start()
        for thread in senders:
            thread.join()
        figures.seconds = time.monotonic() - begun
        done.set()
        honest.join()
        figures.grown_bytes = service.peak_bytes - idle_bytes
        if service.ended:
            fail("the service has ended")
        if (code := service.stop()) != 0:
            fail(f"the service ended with {code}")
    return figures


def post(port: int, body: bytes, media_type: str, path: str = "/embed") -> tuple[int, bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": media_type})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def embedding(answer: bytes) -> NDArray[np.float32]:
    """The first embedding of an answer."""
    return np.asarray(orjson.loads(answer)["embeddings"][0], np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = attack(
            Path(folder),
            images=options.images,
            seed=options.seed,
            connections=options.connections,
        )
    say = sys.stdout.write
    say(f"seed {options.seed}: {figures}\n")
    for failure in figures.failures[:20]:
        say(f"{failure}\n")
    kept = figures.slowest_s <= SLOWEST_S and figures.grown_bytes <= MOST_BYTES
    return 0 if kept and not figures.failures else 1


if __name__ == "__main__":
    sys.exit(main())
