"""A PostgreSQL server of our own: on a socket in a temporary directory, gone with the tests."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest

_ACCOUNTS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


@dataclass(frozen=True)
class Server:
    """A running server that can be stopped and started again."""

    directory: Path
    account: str | None  # whom it runs as; None: as ourselves

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-k {self.directory} -c listen_addresses= -c fsync=off"
        self.run("pg_ctl", "start", "-w", "-t", "60", "-l", "server.log", "-o", options)

    def stop(self) -> None:
        """Stop at once, as a crash would."""
        self.run("pg_ctl", "stop", "-m", "immediate", "-w")

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs on the server's data."""
        found = shutil.which(program)
        assert found is not None
        subprocess.run(
            [found, *arguments],
            check=True,
            cwd=self.directory,
            user=self.account,
            group=None if self.account is None else pwd.getpwnam(self.account).pw_gid,
            extra_groups=None if self.account is None else [],
            env={**os.environ, "PGDATA": str(self.directory / "data"), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def url(self, name: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://tester:secret-word@/{name}?host={self.directory}"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A server with no database of ours."""
    missing = [name for name in ("initdb", "pg_ctl") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no PostgreSQL here: {', '.join(missing)} not found")
    account = None
    if os.geteuid() == 0:
        known = {entry.pw_name for entry in pwd.getpwall()}
        account = next(name for name in _ACCOUNTS if name in known)
    directory = Path(tempfile.mkdtemp(prefix="invprop-pg-"))
    if account is not None:
        shutil.chown(directory, account)
    server = Server(directory, account)
    try:
        server.run("initdb", "--no-sync", "--auth=trust", "--username=tester", "--encoding=UTF8")
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(directory)


_numbers = count()


@pytest.fixture
def new_database(postgresql: Server) -> Callable[[], str]:
    """new_database() -> the URL of an empty database."""

    def _new() -> str:
        name = f"gallery_{next(_numbers)}"
        with psycopg.connect(postgresql.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return postgresql.url(name)

    return _new
