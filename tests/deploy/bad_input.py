"""What an operator may get wrong: each start ends with one line that says what to do."""

import contextlib
import socket
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

from load import Writers
from stack import PROJECT, ROOT, Report, Stack

BAD = f"{PROJECT}-bad"
GPU = f"{ROOT}/docker-compose.yml:{ROOT}/deploy/compose.gpu.yaml"
# Bundle and data sets are the stack's.
GIVEN = f"""
volumes:
  bundles: {{name: {PROJECT}_bundles, external: true}}
  datasets: {{name: {PROJECT}_datasets, external: true}}
"""
# And the database lies on a disk of its own that can be filled.
SMALL_DISK = f"""{GIVEN}
  postgres:
    driver_opts: {{type: tmpfs, device: tmpfs, o: "size=120m,uid=999,gid=999,mode=0700"}}
"""
A_DAY_BEHIND = "import time\nreal = time.time\ntime.time = lambda: real() - 86400.0\n"


def bad_input(stack: Stack, report: Report, folder: Path) -> None:
    """All of them; wants the stack to be up."""
    _secrets(report, folder)
    _bundles(stack, report, folder)
    _proxy(report)
    _database(report, folder)
    with _other(COMPOSE_FILE=GPU) as other:
        said = other.compose("up", "--detach", "--no-deps", "--no-build", "service", check=False)
        _line(report, "no GPU behind the overlay", said, 'could not select device driver "nvidia"')
    _clock(stack, report, folder)
    _full_disk(report, folder)


@contextlib.contextmanager
def _other(**environment: str) -> Iterator[Stack]:
    """Another stack, gone at the end."""
    stack = Stack(BAD, **environment)
    try:
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)


def _line(report: Report, what: str, said: str, wanted: str) -> None:
    """One line of what was said has what is wanted."""
    lines = [line.strip() for line in said.splitlines() if wanted in line]
    report.add(f"bad input: {what}", (lines or [said[-300:]])[-1][-300:], wanted, bool(lines))


def _said(stack: Stack, *words: str) -> str:
    """What a container says that is started once; one that goes on trying is ended."""
    run = ("docker", "compose", "run", "--rm", "-T", "--no-deps")
    return stack.run("timeout", "--kill-after", "30", "45", *run, *words, check=False)


def _secrets(report: Report, folder: Path) -> None:
    empty = _folder(folder / "no-secrets")
    short = _folder(folder / "short-secrets")
    (short / "redis-password").write_text("short")
    for what, where, service, wanted in (
        ("password too short", short, "secrets", "16 or more letters and digits"),
        ("secret missing, service", empty, "service", "missing, empty or not readable"),
        ("secret missing, worker", empty, "worker-cpu", "missing, empty or not readable"),
        ("secret missing, postgres", empty, "postgres", "run the service `secrets`"),
        ("secret missing, redis", empty, "redis", "redis.conf"),
    ):
        with _other(INVPROP_SECRETS=str(where)) as other:
            _line(report, what, _said(other, service), wanted)


def _bundles(stack: Stack, report: Report, folder: Path) -> None:
    missing = _folder(folder / "no-bundle")
    (missing / "current").symlink_to("nowhere")
    with _other(INVPROP_BUNDLES=str(missing)) as other:
        said = _said(other, "sample")
        _line(report, "bundle missing", said, "leads to no bundle")
    damaged = _folder(folder / "damaged")
    stack.compose("cp", "service:/bundles/.", str(damaged))
    encoder = (damaged / "current").resolve() / "encoder.onnx"
    content = bytearray(encoder.read_bytes())
    content[len(content) // 2] ^= 1
    encoder.write_bytes(content)
    with _other(INVPROP_BUNDLES=str(damaged)) as other:
        said = _said(other, "sample")
        _line(report, "bundle damaged, first start", said, "encoder.onnx")
        other.environment["COMPOSE_FILE"] += f":{_overlay(folder / 'given.yaml', GIVEN)}"
        _said(other, "secrets")
        _line(report, "bundle damaged", _said(other, "service"), "encoder.onnx")


def _proxy(report: Report) -> None:
    with _other(INVPROP_TLS="maybe") as other:
        said = _said(other, "proxy")
        _line(report, "unknown TLS mode", said, "tls-maybe.conf")
    with _other(INVPROP_TLS="on") as other:
        said = _said(other, "proxy")
        _line(report, "TLS without a certificate", said, "cert.pem")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        _other(INVPROP_PUBLISH=f"127.0.0.1:{taken.getsockname()[1]}") as other,
    ):
        said = other.compose("up", "--detach", "--no-deps", "--no-build", "proxy", check=False)
        _line(report, "port taken", said, "address already in use")


def _database(report: Report, folder: Path) -> None:
    with _other() as other:
        other.up("postgres", "redis")
        # The password of another stack.
        where = _folder(folder / "wrong-secrets")
        other.compose("cp", "postgres:/run/invprop/.", str(where))
        url = (where / "database-url").read_text()
        begin, _, end = url.partition("@")
        (where / "database-url").write_text(f"{begin[:-8]}00000000@{end}")
        for path in where.iterdir():
            path.chmod(0o644)
        other.environment["INVPROP_SECRETS"] = str(where)
        other.environment["COMPOSE_FILE"] += f":{_overlay(folder / 'given.yaml', GIVEN)}"
        for service in ("service", "worker-cpu"):  # the second says it and goes on trying
            said = _said(other, service)
            _line(report, f"wrong password, {service}", said, "password authentication failed")
        # The volume of another version.
        other.compose("stop", "postgres")
        change = ("--entrypoint", "sh", "postgres", "-c", "echo 14 > $PGDATA/PG_VERSION")
        _said(other, *change)
        said = _said(other, "postgres")
        _line(report, "volume of another PostgreSQL", said, "PostgreSQL 14, this is 15")


def _clock(stack: Stack, report: Report, folder: Path) -> None:
    """Leases go by the database's clock: a worker that is a day behind works."""
    where = _folder(folder / "behind")
    (where / "sitecustomize.py").write_text(A_DAY_BEHIND)
    (where / "sitecustomize.py").chmod(0o644)
    stack.compose("stop", "worker-cpu")
    name = f"{stack.project}-behind"
    stack.compose(
        "run",
        "--detach",
        "--rm",
        "--no-deps",
        "--name",
        name,
        "--volume",
        f"{where}:/behind:ro",
        "--env",
        "PYTHONPATH=/behind",
        "worker-cpu",
    )
    evaluation = stack.evaluate(7)
    ended = stack.until_ended([evaluation], 180)[evaluation]
    report.add(
        "bad input: a worker whose clock is a day behind",
        ended["status"],
        "succeeded: leases go by the database's clock",
        ended["status"] == "succeeded",
    )
    stack.run("docker", "stop", name)
    stack.up()


def _full_disk(report: Report, folder: Path) -> None:
    """The database's disk fills up: changes are refused, searches go on, it mends itself."""
    overlay = _overlay(folder / "small.yaml", SMALL_DISK)
    with _other() as other:
        other.environment["COMPOSE_FILE"] += f":{overlay}"
        other.up()
        # What can be freed again; the rest goes with the writers.
        where = "/var/lib/postgresql/data/filler"
        other.inside("postgres", f"dd if=/dev/zero of={where} bs=1M 2>/dev/null; true")
        with Writers(other, "full", threads=4) as writers:
            began = time.monotonic()
            while sum(writers.refused.values()) < 10 and time.monotonic() - began < 120:
                time.sleep(0.2)
            failed = sum(not _answers(other) for _ in range(100))
            refused, acknowledged = dict(writers.refused), len(writers.acknowledged)
            log = other.compose("logs", "--no-log-prefix", "postgres")
            other.inside("postgres", f"rm {where}", check=False)
            began = time.monotonic()
            while len(writers.acknowledged) <= acknowledged and time.monotonic() - began < 60:
                time.sleep(0.1)
            again = time.monotonic() - began
        report.add(
            "bad input: full disk: changes",
            f"refused {refused}; {log.count('No space left on device')} lines of PostgreSQL say it",
            "507 or 503",
            bool(refused) and set(refused) <= {"507", "503"},
        )
        report.add(
            "bad input: full disk: searches that failed", f"{failed} of 100", "0", not failed
        )
        report.add(
            "bad input: full disk: changes again after space was freed",
            f"{again:.1f} s",
            "<= 30 s",
            again <= 30,
        )
        lost = [name for name in writers.acknowledged if not other.has(name)]
        report.add(
            "bad input: full disk: answered items lost",
            f"{len(lost)} of {len(writers.acknowledged)}",
            "0",
            not lost,
        )


def _answers(stack: Stack) -> bool:
    try:
        stack.search()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _folder(path: Path) -> Path:
    """A folder that the containers' users may write to."""
    path.mkdir(parents=True)
    path.chmod(0o777)
    return path


def _overlay(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
