"""What an operator may get wrong: each start ends with one line that says what to do."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from stack import PROJECT, ROOT, Report, Stack

BAD = f"{PROJECT}-bad"
# Bundle and data sets are the stack's.
GIVEN = f"""
volumes:
  bundles: {{name: {PROJECT}_bundles, external: true}}
  datasets: {{name: {PROJECT}_datasets, external: true}}
"""


def bad_input(stack: Stack, report: Report, folder: Path) -> None:
    """All of them; wants the stack to be up."""
    _secrets(report, folder)
    _bundles(stack, report, folder)
    _proxy(report)
    _database(report, folder)


@contextlib.contextmanager
def other_stack(**environment: str) -> Iterator[Stack]:
    """Another stack, gone at the end."""
    stack = Stack(BAD, **environment)
    try:
        yield stack
    finally:
        # With its overlays, and without: what an overlay calls the stack's may be this one's too.
        for files in (stack.environment["COMPOSE_FILE"], f"{ROOT}/docker-compose.yml"):
            stack.environment["COMPOSE_FILE"] = files
            stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)


def line_of(report: Report, what: str, said: str, wanted: str) -> None:
    """One line of what was said has what is wanted."""
    lines = [line.strip() for line in said.splitlines() if wanted in line]
    report.add(f"bad input: {what}", (lines or [said[-300:]])[-1][-300:], wanted, bool(lines))


def _said(stack: Stack, *words: str) -> str:
    """What a container says that is started once; one that goes on trying is ended."""
    run = ("docker", "compose", "run", "--rm", "-T", "--no-deps")
    return stack.run("timeout", "--kill-after", "30", "45", *run, *words, check=False)


def _secrets(report: Report, folder: Path) -> None:
    empty = folder_for_all(folder / "no-secrets")
    short = folder_for_all(folder / "short-secrets")
    (short / "redis-password").write_text("short")
    for what, where, service, wanted in (
        ("password too short", short, "secrets", "16 or more letters and digits"),
        ("secret missing, service", empty, "service", "missing, empty or not readable"),
        ("secret missing, worker", empty, "worker-cpu", "missing, empty or not readable"),
        ("secret missing, postgres", empty, "postgres", "run the service `secrets`"),
        ("secret missing, redis", empty, "redis", "run the service `secrets`"),
    ):
        with other_stack(INVPROP_SECRETS=str(where)) as other:
            line_of(report, what, _said(other, service), wanted)


def _bundles(stack: Stack, report: Report, folder: Path) -> None:
    missing = folder_for_all(folder / "no-bundle")
    (missing / "current").symlink_to("nowhere")
    with other_stack(INVPROP_BUNDLES=str(missing)) as other:
        said = _said(other, "sample")
        line_of(report, "bundle missing", said, "leads to no bundle")
    damaged = folder_for_all(folder / "damaged")
    stack.compose("cp", "service:/bundles/.", str(damaged))
    encoder = (damaged / "current").resolve() / "encoder.onnx"
    content = bytearray(encoder.read_bytes())
    content[len(content) // 2] ^= 1
    encoder.write_bytes(content)
    with other_stack(INVPROP_BUNDLES=str(damaged)) as other:
        said = _said(other, "sample")
        line_of(report, "bundle damaged, first start", said, "encoder.onnx")
        other.environment["COMPOSE_FILE"] += f":{overlay_file(folder / 'given.yaml', GIVEN)}"
        _said(other, "secrets")
        line_of(report, "bundle damaged", _said(other, "service"), "encoder.onnx")


def _proxy(report: Report) -> None:
    with other_stack(INVPROP_TLS="maybe") as other:
        said = _said(other, "proxy")
        line_of(report, "unknown TLS mode", said, "tls-maybe.conf")
    with other_stack(INVPROP_TLS="on") as other:
        said = _said(other, "proxy")
        line_of(report, "TLS without a certificate", said, "cert.pem")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        other_stack(INVPROP_PUBLISH=f"127.0.0.1:{taken.getsockname()[1]}") as other,
    ):
        said = other.compose("up", "--detach", "--no-deps", "--no-build", "proxy", check=False)
        line_of(report, "port taken", said, "address already in use")


def _database(report: Report, folder: Path) -> None:
    with other_stack() as other:
        other.up("postgres", "redis")
        # The password of another stack.
        where = folder_for_all(folder / "wrong-secrets")
        other.compose("cp", "postgres:/run/invprop/.", str(where))
        url = (where / "database-url").read_text()
        begin, _, end = url.partition("@")
        (where / "database-url").write_text(f"{begin[:-8]}00000000@{end}")
        for path in where.iterdir():
            path.chmod(0o644)
        other.environment["INVPROP_SECRETS"] = str(where)
        other.environment["COMPOSE_FILE"] += f":{overlay_file(folder / 'given.yaml', GIVEN)}"
        for service in ("service", "worker-cpu"):
            said = _said(other, service)
            line_of(report, f"wrong password, {service}", said, "password authentication failed")
        (where / "database-url").write_text(url)
        (where / "broker-url").write_text("redis://:another@redis:6379/0")
        said = _said(other, "worker-cpu")
        line_of(report, "wrong password of Redis, worker-cpu", said, "refuses the connection")
        # The volume of another version.
        other.compose("stop", "postgres")
        change = ("--entrypoint", "sh", "postgres", "-c", "echo 14 > $PGDATA/PG_VERSION")
        _said(other, *change)
        said = _said(other, "postgres")
        line_of(report, "volume of another PostgreSQL", said, "PostgreSQL 14, this is 15")


def folder_for_all(path: Path) -> Path:
    """A folder that the containers' users may write to."""
    path.mkdir(parents=True)
    path.chmod(0o777)
    return path


def overlay_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
