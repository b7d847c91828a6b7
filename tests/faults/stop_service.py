"""SIGTERM services under load, and compare what they did with what they answered.

    python tests/faults/stop_service.py --stops 50 --seed 0

Each round forks `service.run`, writes, embeds and searches from several connections, asks /readyz
again and again on new ones, and sends SIGTERM at a random moment. Readiness must go before new
connections are refused, every request that the service took must be answered, whole (the log
counts them), or refused in a way that asks to try again, the exit code must be 0; the next start
must hold what was acknowledged, and nothing that was not. Fails (exit 1) with what is wrong.
"""

import argparse
import contextlib
import http.client
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.schemas.items import DeleteRequest
from tests.faults.oracle import State, Stored, Writer, Wrong, check
from tests.faults.served import Answer, Connection, Served
from tests.service.conftest import DIM, build_bundle, encoded
from trainer.representation.bundle import open_bundle

WRITERS = 2
DRAIN_S = 0.3  # drain_delay_s: how long readiness says 503 before connections are refused
LEAVES_WITHIN_S = 15
RETRYABLE = (429, 503, 504, 507)
# The connection was closed before a byte of an answer came. Whether the service had taken the
# request, its log tells.
NOT_TAKEN = (ConnectionError, http.client.RemoteDisconnected)


def prove(folder: Path, stops: int, seed: int) -> Counter[str]:
    """Stop `stops` services; returns counts of what was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    bundle, state = build_bundle(folder / "bundle", images=6), folder / "state"
    gallery = open_bundle(bundle).gallery()
    bundled: State = {
        i: Stored(v, {}) for i, v in zip(gallery.ids, gallery.embeddings, strict=True)
    }
    writers = [
        Writer(
            n,
            {},
            seed=f"{seed}",
            dim=DIM,
            largest=200,
            by_filter="filter" in DeleteRequest.model_fields,
        )
        for n in range(WRITERS)
    ]
    for _ in range(stops):
        served = Served(bundle, state, log=folder / "log", drain_delay_s=DRAIN_S, log_level="debug")
        try:
            served.start()
            answers = _check(served, writers, bundled)
            _Round(served, writers, seen, answers).run(draw.random() * 0.4)
        finally:
            served.kill()
        seen["stops"] += 1
    served = Served(bundle, state, log=folder / "log").start()
    _check(served, writers, bundled)
    assert served.stop() == 0, served.said()
    seen["changes answered"] = sum(writer.answers for writer in writers)
    return seen


def _check(served: Served, writers: list[Writer], bundled: State) -> int:
    """What was not answered was not taken, so it must not be there. Returns the answers it got."""
    connection = served.connect()
    outcomes = check(connection, writers, bundled)
    if outcomes["one more"]:
        raise Wrong(f"{outcomes['one more']} requests were done and not answered")
    connection.close()
    return connection.answers


class _Round:
    """One service under load until it is gone."""

    def __init__(
        self, served: Served, writers: list[Writer], seen: Counter[str], answers: int
    ) -> None:
        self._served, self._seen = served, seen
        self._failures: list[BaseException] = []
        self._readiness: list[int] = []
        self._answers = answers
        self._lock = threading.Lock()
        picture = encoded(1)
        query = {"vectors": [[1.0] + [0.0] * (DIM - 1)], "k": 5}
        loads: list[Callable[[Connection], Answer]] = [writer.work for writer in writers]
        loads.append(lambda c: c.ask("POST", "/embed", picture, kind="image/png"))
        loads.append(lambda c: c.ask("POST", "/neighbours", query))
        self._threads = [threading.Thread(target=self._load, args=(load,)) for load in loads]
        self._threads.append(threading.Thread(target=self._watch))

    def run(self, after_s: float) -> None:
        """Load it, stop it after a while (the random moment), and see how it leaves."""
        for thread in self._threads:
            thread.start()
        time.sleep(after_s)
        self._served.send(signal.SIGTERM)
        began = time.monotonic()
        code = self._served.wait(LEAVES_WITHIN_S)
        took = round(1000 * (time.monotonic() - began))
        self._seen["longest to leave, ms"] = max(took, self._seen["longest to leave, ms"])
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
        assert code == 0, (code, self._served.said())
        assert "Traceback" not in self._served.said(), self._served.said()
        # 200 until the signal, 503 from then on, and only then nothing.
        assert self._readiness == sorted(self._readiness), self._readiness
        assert 503 in self._readiness, "connections were refused while /readyz said 200"
        taken = self._logged()
        assert taken == self._answers, f"{taken} requests were taken, {self._answers} answered"

    def _load(self, load: Callable[[Connection], Answer]) -> None:
        """Ask until nobody answers any more, on a new connection where one was closed."""
        connection = self._served.connect()
        try:
            while True:
                try:
                    answer = load(connection)
                except ConnectionRefusedError:
                    return
                except NOT_TAKEN:
                    self._count("closed before they were taken")
                    if self._served.ended():
                        return
                    time.sleep(0.005)
                    continue
                self._count("requests answered")
                with self._lock:
                    self._answers += 1
                if answer.status != 200:
                    self._count(f"refused with {answer.status}")
                    if answer.status not in RETRYABLE:
                        raise Wrong(f"answered {answer.status}: {answer.body[:500]!r}")
                    if "retry-after" not in {name.lower() for name in answer.headers}:
                        raise Wrong(f"{answer.status} without Retry-After")
        except BaseException as error:  # noqa: BLE001 - a thread's door: raised again by `run`
            self._failures.append(error)
        finally:
            connection.close()

    def _watch(self) -> None:
        """What a load balancer sees."""
        while True:
            connection = self._served.connect()
            with contextlib.closing(connection):
                try:
                    status = connection.ask("GET", "/readyz").status
                except ConnectionRefusedError:
                    return
                except NOT_TAKEN:
                    continue
            self._readiness.append(status)
            with self._lock:
                self._answers += 1

    def _count(self, what: str) -> None:
        with self._lock:
            self._seen[what] += 1

    def _logged(self) -> int:
        """Requests that the service says it has dealt with."""
        entries = [json.loads(line) for line in self._served.said().splitlines() if line]
        return sum(entry["event"] == "request" for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    sys.stdout.write(f"seed {options.seed}\n")
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(Path(folder), options.stops, options.seed)
    sys.stdout.write(", ".join(f"{what}: {n}" for what, n in sorted(seen.items())))
    sys.stdout.write(
        f"\n{options.stops} stops: every request that was taken was answered, 0 lost; "
        f"{time.monotonic() - began:.0f} s\n"
    )


if __name__ == "__main__":
    main()
