"""What an operator may run out of, and clocks that are wrong."""

import contextlib
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

from bad_input import GIVEN, folder_for_all, line_of, other_stack, overlay_file
from load import Writers
from stack import ENDED_S, Report, Stack

# Bundle and data sets are the stack's, and one thing lies on a small disk of its own.
SMALL_DATABASE = f"""{GIVEN}
  postgres:
    driver_opts: {{type: tmpfs, device: tmpfs, o: "size=120m,uid=999,gid=999,mode=0700"}}
"""
SMALL_REDIS = f"""{GIVEN}
  redis:
    driver_opts: {{type: tmpfs, device: tmpfs, o: "size=16m,uid=999,gid=999,mode=0700"}}
"""
SMALL_CACHES = f"""{GIVEN}
  service-caches: &small
    driver_opts: {{type: tmpfs, device: tmpfs, o: "size=32m,uid=10001,gid=10001,mode=0755"}}
  worker-caches: *small
services:
  service: {{volumes: ["service-caches:/var/lib/invprop"]}}
  worker-cpu: {{volumes: ["worker-caches:/var/lib/invprop"]}}
"""
SMALL_BUNDLES = """
volumes:
  bundles:
    driver_opts: {type: tmpfs, device: tmpfs, o: "size=2m,uid=10001,gid=10001,mode=0755"}
"""
CACHE = "/var/lib/invprop/filler"
FILL = "dd if=/dev/zero of={} bs=64k 2>/dev/null; true"
OFF_BY = "import time\nreal = time.time\ntime.time = lambda: real() + ({})\n"
A_DAY_S = 86400.0


def clocks(stack: Stack, report: Report, folder: Path) -> None:
    """Leases go by the database's clock: a worker or a service that is a day off works."""
    for service, what, off_s in (
        ("worker-cpu", "a worker's clock a day behind", -A_DAY_S),
        ("service", "the service's clock a day behind", -A_DAY_S),
        ("service", "the service's clock a day ahead", A_DAY_S),
    ):
        with _off(stack, folder, service, off_s):
            name = f"{service}-{off_s:.0f}.png"
            stack.add(name)
            evaluation = stack.evaluate(7)
            ended = stack.until_ended([evaluation], ENDED_S)[evaluation]
            works = ended["status"] == "succeeded" and stack.has(name)
            report.add(
                f"bad input: {what}",
                f"an item added and read, an evaluation {ended['status']}",
                "as with a right one",
                works,
            )


@contextlib.contextmanager
def _off(stack: Stack, folder: Path, service: str, off_s: float) -> Iterator[None]:
    """A service of the stack with another clock, and with the right one again at the end."""
    where = folder_for_all(folder / f"{service}{off_s}")
    (where / "sitecustomize.py").write_text(OFF_BY.format(off_s))
    (where / "sitecustomize.py").chmod(0o644)
    text = (
        f"services: {{{service}: {{environment: {{PYTHONPATH: /clock}}, "
        f'volumes: ["{where}:/clock:ro"]}}}}\n'
    )
    before = dict(stack.environment)
    stack.environment["COMPOSE_FILE"] += f":{overlay_file(where / 'clock.yaml', text)}"
    try:
        stack.up()
        yield
    finally:
        stack.environment = before
        stack.up()


def disks(report: Report, folder: Path) -> None:
    """Disks fill up: refusals that say so, nothing answered is lost, and it mends itself."""
    _full_database(report, folder)
    _full_redis(report, folder)
    _full_caches(report, folder)
    _full_bundles(report, folder)


def _full_redis(report: Report, folder: Path) -> None:
    """Evaluations lie in PostgreSQL: Redis only rings for them."""
    with _other_with(SMALL_REDIS, folder / "small-redis.yaml") as other:
        other.inside("redis", FILL.format("/data/filler"))
        accepted = []
        refused = 0
        for seed in range(3):
            try:
                accepted.append(other.evaluate(seed))
            except urllib.error.HTTPError as error:
                refused += 1
                if error.code != 503:
                    raise
        failed = sum(not answers(other) for _ in range(100))
        time.sleep(20)
        other.inside("redis", "rm /data/filler")
        ended = other.until_ended(accepted, ENDED_S)
        statuses = sorted(each["status"] for each in ended.values())
        report.add(
            "bad input: full disk of Redis: evaluations",
            f"{len(accepted)} accepted, {refused} refused; once there is space: {statuses}",
            "all that were accepted succeed",
            set(statuses) <= {"succeeded"} and len(statuses) == len(accepted),
        )
        report.add(
            "bad input: full disk of Redis: searches that failed",
            f"{failed} of 100",
            "0",
            not failed,
        )


def _full_caches(report: Report, folder: Path) -> None:
    """What service and worker keep on their own is a cache."""
    with _other_with(SMALL_CACHES, folder / "small-caches.yaml") as other:
        for service in ("service", "worker-cpu"):
            other.inside(service, FILL.format(CACHE))
        with Writers(other, "full-cache") as writers:
            failed = sum(not answers(other) for _ in range(100))
            time.sleep(2)
        evaluation = other.evaluate(0)
        ended = other.until_ended([evaluation], ENDED_S)[evaluation]
        said = str((ended.get("error") or {}).get("detail", ended.get("error")))
        report.add(
            "bad input: full disk of the service's caches: changes, searches that failed",
            f"{len(writers.acknowledged)} taken, refused {writers.refused or 0}; {failed} of 100",
            "taken, or 507; 0",
            not failed and set(writers.refused) <= {"507"},
        )
        report.add(
            "bad input: full disk of the worker's caches: an evaluation",
            f"{ended['status']}: {said[:200]}",
            "succeeded, or failed and says No space left",
            ended["status"] == "succeeded" or "No space left" in said,
        )
        other.compose("restart", "service")
        began = time.monotonic()
        other.until_answers()
        took = time.monotonic() - began
        lost = [name for name in writers.acknowledged if not other.has(name)]
        report.add(
            "bad input: full disk of the service's caches: started again, answered items lost",
            f"{took:.1f} s, {len(lost)} of {len(writers.acknowledged)}",
            "answers, 0",
            not lost,
        )
        for service in ("service", "worker-cpu"):
            other.inside(service, f"rm -f {CACHE}")
        evaluation = other.evaluate(1)
        ended = other.until_ended([evaluation], ENDED_S)[evaluation]
        report.add(
            "bad input: full disk of the caches: an evaluation once there is space",
            ended["status"],
            "succeeded",
            ended["status"] == "succeeded",
        )


def _full_bundles(report: Report, folder: Path) -> None:
    with _other_with(SMALL_BUNDLES, folder / "small-bundles.yaml", up=False) as other:
        run = ("run", "--rm", "-T", "--no-deps", "sample")
        said = other.run("timeout", "120", "docker", "compose", *run, check=False)
        line_of(report, "full disk of the bundles, training", said, "No space left on device")
        tracebacks = said.count("Traceback")
        report.add(
            "bad input: full disk of the bundles: tracebacks", str(tracebacks), "0", not tracebacks
        )


def _full_database(report: Report, folder: Path) -> None:
    """Changes are refused, searches go on, it mends itself."""
    with _other_with(SMALL_DATABASE, folder / "small-database.yaml") as other:
        # What can be freed again; the rest goes with the writers.
        where = "/var/lib/postgresql/data/filler"
        other.inside("postgres", FILL.format(where))
        with Writers(other, "full", threads=4) as writers:
            began = time.monotonic()
            while sum(writers.refused.values()) < 10 and time.monotonic() - began < 120:
                time.sleep(0.2)
            failed = sum(not answers(other) for _ in range(100))
            refused, acknowledged = dict(writers.refused), len(writers.acknowledged)
            log = other.compose("logs", "--no-log-prefix", "postgres")
            other.inside("postgres", f"rm {where}", check=False)
            began = time.monotonic()
            while len(writers.acknowledged) <= acknowledged and time.monotonic() - began < 60:
                time.sleep(0.1)
            again = time.monotonic() - began
        report.add(
            "bad input: full disk of the database: changes",
            f"refused {refused}; {log.count('No space left on device')} lines of PostgreSQL say it",
            "507 or 503",
            bool(refused) and set(refused) <= {"507", "503"},
        )
        report.add(
            "bad input: full disk of the database: searches that failed",
            f"{failed} of 100",
            "0",
            not failed,
        )
        report.add(
            "bad input: full disk of the database: changes again after space was freed",
            f"{again:.1f} s",
            "<= 30 s",
            again <= 30,
        )
        lost = [name for name in writers.acknowledged if not other.has(name)]
        report.add(
            "bad input: full disk of the database: answered items lost",
            f"{len(lost)} of {len(writers.acknowledged)}",
            "0",
            not lost,
        )


@contextlib.contextmanager
def _other_with(text: str, path: Path, up: bool = True) -> Iterator[Stack]:
    """Another stack with an overlay, up unless it says otherwise; gone at the end."""
    with other_stack() as other:
        other.environment["COMPOSE_FILE"] += f":{overlay_file(path, text)}"
        if up:
            other.up()
        yield other


def answers(stack: Stack) -> bool:
    try:
        stack.search()
    except (urllib.error.URLError, OSError):
        return False
    return True
