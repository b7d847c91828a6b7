"""Services that are started often and end badly: forked, so that a start takes half a second.

In: a bundle, a state directory, flags. Out: a process that runs `service.run` as the command line
does. Whoever uses this imports it early, has no other threads while it forks, and never calls
faiss or onnxruntime itself: their threads do not survive a fork.
"""

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.run import main as serve

START_S = 60
NDJSON = "application/x-ndjson"


class Served:
    """One process of the service.

    Args:
        log: where its stderr goes.
        prepare: called in the new process before the service runs: limits, failpoints.
        flags: as on the command line: max_rows=5 is --max-rows 5.
    """

    def __init__(
        self,
        bundle: Path,
        state: Path,
        *,
        log: Path,
        prepare: Callable[[], None] = lambda: None,
        **flags: object,
    ) -> None:
        self.log = log
        self.url = ""
        self.code: int | None = None
        self._receive, send = os.pipe()
        given = {"bundle": bundle, "state": state, "port": 0, "decoder_processes": 1, **flags}
        words = [w for k, v in given.items() for w in ("--" + k.replace("_", "-"), str(v))]
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(self._receive)
                os.dup2(send, 1)
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                prepare()
                code = serve(words)
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(send)

    def ready(self) -> bool:
        """Wait for the line that says it serves; False where it ended instead."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self._receive, 4096)
            if not piece:
                self.wait()
                return False
            line += piece
        assert line.startswith(b"ready: http://"), line
        self.url = line.split()[1].decode()
        return True

    def start(self) -> "Served":
        """The same, where anything but a service that serves is a failure."""
        assert self.ready(), f"exit code {self.code}: {self.said()}"
        return self

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text()

    def error(self) -> str:
        """Its last words, without `error: `; "" where it said none."""
        lines = self.said().strip().splitlines()
        return lines[-1][7:] if lines and lines[-1].startswith("error: ") else ""

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended already."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, within_s: float = START_S) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        gives_up = time.monotonic() + within_s
        while not self.ended():
            if time.monotonic() > gives_up:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still there after {within_s} s: {self.said()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self._receive)
        return self.code is not None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def connect(self, timeout_s: float = START_S) -> "Connection":
        """A client of its own; not to be shared between threads."""
        return Connection(self.url, timeout_s)


class Answer:
    """Status and body of one answer."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status, self.body, self.headers = status, body, headers

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One kept-alive connection; no retries, nothing hidden."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.answers = 0  # whole ones, whatever their status
        self._http = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; OSError or HTTPException where there was no whole answer."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = dict(headers or {})
        if content is not None:
            sent["content-type"] = kind
        try:
            self._http.request(method, path, content, sent)
            response = self._http.getresponse()
            answer = Answer(response.status, response.read(), dict(response.getheaders()))
            self.answers += 1
            return answer
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._http.close()
