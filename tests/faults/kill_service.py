"""SIGKILL services that are written to, and compare what they hold with what they answered.

    python tests/faults/kill_service.py --kills 1000 --seed 0

Each round forks `service.run` on the state that the rounds before left, compares every item, vector
and search with what was acknowledged, writes to it from several connections (batches of 1 to 1024,
replacing, deleting, idempotency keys used again) and kills it: at a random moment, while it starts,
or at a named point of its code. What was not acknowledged must be there whole or not at all. Every
`FRESH_EVERY` rounds begin with an empty directory. Fails (exit 1) with what is wrong.
"""

import argparse
import contextlib
import http.client
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.schemas.items import DeleteRequest
from tests.faults.oracle import State, Stored, Writer, check
from tests.faults.served import Served
from tests.service.conftest import DIM, build_bundle, encoded
from trainer.representation.bundle import open_bundle

WRITERS = 3
BUNDLED = 6  # items of the bundle's gallery
FRESH_EVERY = 40  # rounds; the log grows with each
AT_START = 0.15  # share of the kills before the service is ready
AT_POINT = 0.35  # share of the kills at a named point
MOMENT_S = 0.3  # of writing, at most, before a kill at a random moment
NO_ANSWER = (OSError, http.client.HTTPException)


def prove(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill `kills` services; returns counts of what was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    bundle = build_bundle(folder / "bundle", images=BUNDLED)
    gallery = open_bundle(bundle).gallery()
    bundled: State = {
        i: Stored(v, {}) for i, v in zip(gallery.ids, gallery.embeddings, strict=True)
    }
    pictures = [encoded(n) for n in range(3)]
    state, writers, usual_s = folder / "none", list[Writer](), 1.0
    for number in range(kills):
        if number % FRESH_EVERY == 0:
            state = folder / f"state-{number}"
            writers = [
                Writer(
                    n,
                    {},
                    seed=f"{seed} {number}",
                    dim=DIM,
                    pictures=pictures,
                    by_filter="filter" in DeleteRequest.model_fields,
                )
                for n in range(WRITERS)
            ]
        at_start = draw.random() < AT_START
        point = draw.choice(list(POINTS)) if not at_start and draw.random() < AT_POINT else None
        began = time.monotonic()
        served = Served(
            bundle,
            state,
            log=folder / "log",
            prepare=partial(_arm, point, draw.randrange(1, 16)),
        )
        try:
            if at_start:
                time.sleep(draw.random() * usual_s)
                seen["kills while starting"] += 1
                continue
            seen["kills while writing" if point is None else f"kills {point}"] += 1
            if served.ready():
                usual_s = time.monotonic() - began
                # A point may be passed as early as when unanswered requests are sent again.
                with contextlib.suppress(*(NO_ANSWER if point else ())):
                    _check(served, writers, bundled, seen)
                    _write_until_killed(served, writers, draw.random() * MOMENT_S, point)
            elif point is None or served.code != -signal.SIGKILL:
                raise AssertionError(f"the service did not start: {served.said()}")
        finally:
            served.kill()
    served = Served(bundle, state, log=folder / "log").start()
    _check(served, writers, bundled, seen)
    assert served.stop() == 0, served.said()
    seen["answers in the last state"] = sum(writer.answers for writer in writers)
    return seen


def _check(served: Served, writers: list[Writer], bundled: State, seen: Counter[str]) -> None:
    connection = served.connect()
    for writer in writers:
        if writer.on_its_way is not None:
            seen["unanswered requests"] += 1
            if writer.on_its_way.key is not None:
                seen["sent again under their key"] += 1
                writer.repeat(connection)
    outcomes = check(connection, writers, bundled)
    seen["restarts compared"] += 1
    seen["items compared"] += len(bundled) + sum(len(writer.state) for writer in writers)
    seen["unanswered but there"] += outcomes["one more"]
    connection.close()


def _write_until_killed(
    served: Served, writers: list[Writer], after_s: float, point: str | None
) -> None:
    """Let every writer work on a connection of its own; kill after a while, or let it kill itself.

    The moment is random: a round is over when every connection is broken.
    """
    failures: list[BaseException] = []

    def work(writer: Writer) -> None:
        connection = served.connect()
        try:
            with contextlib.suppress(*NO_ANSWER):
                while True:
                    writer.work(connection)
        except BaseException as error:  # noqa: BLE001 - a thread's door: raised again below
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    if point is None:
        time.sleep(after_s)
        served.send(signal.SIGKILL)
    else:  # it kills itself; where the point is not passed any more, this does
        for _ in range(400):
            if served.ended():
                break
            time.sleep(0.005)
    served.kill()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _kill_in(owner: Any, name: str, *, before: bool) -> Callable[[int], None]:
    """A point: the process kills itself before, or after, the n-th call of a function."""

    def install(fails_at: int) -> None:
        real, calls = getattr(owner, name), [0]

        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if before and calls[0] == fails_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **named)
            if calls[0] == fails_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    return install


def _arm(point: str | None, fails_at: int) -> None:
    """In the forked process alone."""
    if point is not None:
        POINTS[point](fails_at)


POINTS: dict[str, Callable[[int], None]] = {
    "before a commit": _kill_in(DefaultDialect, "do_commit", before=True),
    "after a commit, before the answer": _kill_in(DefaultDialect, "do_commit", before=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    print_line = sys.stdout.write
    print_line(f"seed {options.seed}\n")
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(Path(folder), options.kills, options.seed)
    print_line(", ".join(f"{what}: {n}" for what, n in sorted(seen.items())))
    print_line(
        f"\n{options.kills} kills: 0 lost, 0 torn, 0 resurrected; "
        f"{time.monotonic() - began:.0f} s\n"
    )


if __name__ == "__main__":
    main()
