"""One project of docker compose, asked over HTTP as a caller would; and the table of figures."""

import base64
import contextlib
import json
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "invprop-test"
ANSWERS_AGAIN_S = 30.0  # promised after the loss of any container
WAIT_S = 600
RUNNING = ("proxy", "service", "worker-cpu", "redis", "postgres")
# A worker that was killed is missed when its lease ends: 60 s, and 15 s until the next sweep.
ENDED_S = 240.0
ENDED = ("succeeded", "failed", "cancelled", "lost")


class Broken(Exception):
    """Something was not as promised, and nothing can follow."""


class Stack:
    """One project of docker compose, and its address on this host."""

    def __init__(self, project: str = PROJECT, **environment: str) -> None:
        self.project = project
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.trust: ssl.SSLContext | None = None  # where `url` is https
        self.environment = {
            **{name: value for name, value in os.environ.items() if "INVPROP" not in name},
            "COMPOSE_PROJECT_NAME": project,
            "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
            "INVPROP_PUBLISH": f"127.0.0.1:{self.port}",
            **environment,
        }

    def run(self, *words: str, check: bool = True, timeout_s: float = WAIT_S) -> str:
        """Run a program with the stack's environment; its output, both streams."""
        try:
            done = subprocess.run(
                words,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise Broken(f"{' '.join(words)[:200]} took more than {timeout_s:.0f} s") from error
        if check and done.returncode:
            raise Broken(
                f"{' '.join(words)[:200]} ended with {done.returncode}:\n{done.stdout[-3000:]}"
            )
        return done.stdout

    def compose(self, *words: str, check: bool = True) -> str:
        """docker compose WORDS."""
        return self.run("docker", "compose", *words, check=check)

    def up(self, *words: str, check: bool = True) -> str:
        """docker compose up, until all is healthy."""
        wait = ("--detach", "--no-build", "--wait", "--wait-timeout", str(WAIT_S))
        return self.compose("up", *wait, *words, check=check)

    def inside(self, service: str, script: str, check: bool = True, index: int = 1) -> str:
        """Run a shell script in a running container."""
        where = ("exec", "-T", "--index", str(index), service)
        return self.compose(*where, "sh", "-c", script, check=check)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> Any:
        """One request through the proxy; the answer's JSON. Raises OSError where it is an error."""
        given = {"Content-Type": kind} if body else {}
        return json.loads(self.read(method, path, body, given | (headers or {})))

    def read(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """One request through the proxy; the answer's bytes."""
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers=headers or {}
        )
        with urllib.request.urlopen(request, timeout=35, context=self.trust) as answer:
            content: bytes = answer.read()
            return content

    def search(self) -> Any:
        """The neighbours of some item."""
        return self.ask("POST", "/neighbours", query(self.first_id()))

    def until_answers(self) -> None:
        """Wait until a search by id is answered."""
        began = time.monotonic()
        while time.monotonic() - began < 4 * ANSWERS_AGAIN_S:
            with contextlib.suppress(OSError, ValueError):
                self.search()
                return
            time.sleep(0.1)
        raise Broken(
            f"not answering: {self.compose('ps', '--all')}{self.compose('logs', '--tail', '20')}"
        )

    def first_id(self) -> str:
        """The id of some item."""
        return str(self.ask("GET", "/items?limit=1")["items"][0]["id"])

    def add(self, name: str, *sources: str) -> Any:
        """Add a picture as an item; the answer."""
        line = {"id": name, "image": picture(name), "metadata": {"from": list(sources)}}
        return self.ask("POST", "/items", json.dumps(line).encode(), "application/x-ndjson")

    def has(self, item: str) -> bool:
        """Whether there is such an item."""
        try:
            self.ask("GET", f"/items/{item}")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False
        return True

    def items(self) -> dict[str, tuple[Any, Any]]:
        """id -> metadata and vector, of the whole gallery."""
        found: dict[str, tuple[Any, Any]] = {}
        cursor = ""
        while True:
            page = self.ask("GET", f"/items?include=vector&limit=1000{cursor}")
            for item in page["items"]:
                found[item["id"]] = (item["metadata"], item["vector"])
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    def evaluate(self, seed: int) -> str:
        """Ask for a kNN evaluation on the digits; its id once it is accepted."""
        asked = {"protocol": "knn", "dataset": "digits", "settings": {"k": [20]}, "seed": seed}
        return str(self.ask("POST", "/evaluations", json.dumps(asked).encode())["id"])

    def until_ended(self, evaluations: Sequence[str], limit_s: float) -> dict[str, Any]:
        """Wait until all have ended, or the time is over; id -> evaluation."""
        found: dict[str, Any] = {}
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            for each in evaluations:
                if found.get(each, {}).get("status") not in ENDED:
                    with contextlib.suppress(OSError, ValueError):
                        found[each] = self.ask("GET", f"/evaluations/{each}")
            if all(found.get(each, {}).get("status") in ENDED for each in evaluations):
                break
            time.sleep(0.5)
        return found

    def containers(self) -> dict[str, str]:
        """Name of each running container -> the compose service that it is of."""
        listed = self.run(
            "docker",
            "ps",
            "--filter",
            f"label=com.docker.compose.project={self.project}",
            "--format",
            '{{.Names}} {{.Label "com.docker.compose.service"}}',
        )
        return dict(line.split() for line in listed.splitlines())


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def query(item: str) -> bytes:
    """The body of a search by id."""
    return json.dumps({"ids": [item], "k": 5}).encode()


def picture(seed: str) -> str:
    """A grey PNG of 16 x 16 random pixels, base64."""
    draw = random.Random(seed)
    rows = b"".join(b"\0" + draw.randbytes(16) for _ in range(16))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(png).decode()


class Report:
    """Lines of a table: what, figure, wanted, met."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, bool]] = []
        self.left_out: list[tuple[str, str]] = []

    def add(self, what: str, figure: str, wanted: str, met: bool) -> None:
        """A line."""
        self.lines.append((what, figure.replace("|", "/").replace("\n", " "), wanted, met))
        sys.stdout.write(f"{'ok ' if met else 'NOT'} {what}: {figure} (wanted: {wanted})\n")
        sys.stdout.flush()

    def leave_out(self, what: str, why: str) -> None:
        """A line about what cannot be tried here; it does not count as failed."""
        self.left_out.append((what, why.replace("|", "/").replace("\n", " ")))
        sys.stdout.write(f"--  {what}: not tried: {self.left_out[-1][1]}\n")
        sys.stdout.flush()

    def table(self) -> str:
        """All of them as Markdown."""
        head = "| what | figure | wanted | met |\n|---|---|---|---|\n"
        lines = [
            f"| {what} | {figure} | {wanted} | {'yes' if met else 'NO'} |\n"
            for what, figure, wanted, met in self.lines
        ]
        lines += [f"| {what} | {why} | | not tried |\n" for what, why in self.left_out]
        return head + "".join(lines)


@contextlib.contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the seconds that the block took."""
    began = time.monotonic()
    yield
    into.append(time.monotonic() - began)
