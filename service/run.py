"""Start the service: python -m service.run --bundle DIR --state DIR [--host HOST] [--port PORT] ...

Every flag has an environment variable: --max-body-bytes is INVPROP_MAX_BODY_BYTES. Logs are JSON
lines on stderr; one line for people goes to stdout when the service is ready. SIGTERM and SIGINT
end it: readiness first, then running requests, then the log is closed; exit code 0. SIGHUP takes
over the bundle that its path holds now. A start that fails says `error: ...` and exits with 1.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.arguments import SettingsError, read_settings
from service.datasets import RegistryError
from service.keys import KeysError
from service.observability import configure_logging
from service.protocol import BoundedConfig, Connections
from service.runtime import Runtime
from service.settings import Settings

TICKS_PER_S = 10  # how often uvicorn calls on_tick
SPARE_FILES = 256  # file descriptors for everything that is no connection


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    try:
        settings = read_settings(arguments)
        allow_files(settings.max_connections + SPARE_FILES)
        listener = listen(settings)
    except (SettingsError, StartError) as error:
        return _fail(error)
    configure_logging(settings.log_level)
    with listener:
        try:
            app = create_app(settings)
        except (KeysError, RegistryError) as error:
            return _fail(error)
        server = Server(app, settings, listener)
        # uvicorn's own choice: uvloop, which asyncio.run alone would leave unused.
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))
        failure = server.runtime.failure
    return 0 if failure is None else _fail(failure)


class StartError(Exception):
    """The service cannot start; the message is for the operator."""


class Server(uvicorn.Server):
    """uvicorn with our signals, our last words and our reasons to stop."""

    def __init__(self, app: FastAPI, settings: Settings, listener: socket.socket) -> None:
        runtime = app.state.runtime
        assert isinstance(runtime, Runtime)
        self.runtime = runtime
        self.bounds = Connections(settings, runtime.metrics)
        super().__init__(
            BoundedConfig(
                app,
                self.bounds,
                log_config=None,
                access_log=False,  # service.observability writes one line for each request
                server_header=False,
                proxy_headers=False,  # an address that the caller claims is no address
                lifespan="on",
                timeout_graceful_shutdown=settings.shutdown_timeout_s,
            )
        )
        self._settings = settings
        self._listener = listener
        self._announced = False
        self._stop_at: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for `_stop`. uvicorn would raise them again at the end, and the
        exit code would not be 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.runtime.reload)
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if counter % TICKS_PER_S == 0:
            self.bounds.sweep()
        if self.runtime.failure is not None:
            return True
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            return True
        if not self._announced and self.runtime.loaded.is_set():
            self._announced = True
            sys.stdout.write(self._announcement())
            sys.stdout.flush()
        return await super().on_tick(counter)

    def _stop(self, number: int) -> None:
        now = time.monotonic()
        if self._stop_at is not None and now >= self._stop_at:  # already draining: end at once
            self.force_exit = True
        # A second signal, or a person at the keyboard, does not wait for a load balancer.
        waits = number == signal.SIGTERM and self._stop_at is None
        self._stop_at = now + (self._settings.drain_delay_s if waits else 0)
        self.runtime.draining = True

    def _announcement(self) -> str:
        host, port = self._listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        embedder, snapshot = self.runtime.embedder, self.runtime.gallery.snapshot()
        return (
            f"ready: {url} serves {len(snapshot):,} items with model {embedder.model_id[:12]} in "
            f"{embedder.precision} on {embedder.execution_provider}. Try {url}/docs, or: "
            f"curl -F images=@PHOTO.jpg '{url}/neighbours?k=5'\n"
        )


def listen(settings: Settings) -> socket.socket:
    """Take the port before anything is loaded.

    Raises:
        StartError: it cannot be taken.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {settings.host} port {settings.port}: "
            f"{os.strerror(error.errno or 0)}; choose "
            "another --port, or end what uses it"
        ) from error
    # Inherited by every connection. Without it head and body of an answer, two writes, wait for
    # each other's acknowledgement: 40 ms on every small request.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def allow_files(wanted: int) -> None:
    """Let the process open so many files, as far as it may itself.

    Raises:
        StartError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise StartError(
            f"max_connections wants {wanted:,} open files, the process may have {hard:,}; raise "
            "that limit (ulimit -Hn), or choose a lower --max-connections"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _fail(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
