"""deploy/train_multinode.sh on two hosts: two network namespaces joined by a cable.

Run: pytest tests/distributed/test_two_hosts.py [-m ""]     as root, on Linux with iproute2.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.distributed.tiny_ranks import TINY

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "train_multinode.sh"


class Hosts(NamedTuple):
    """Two names of network namespaces, and the addresses they have."""

    names: tuple[str, str]
    addresses: tuple[str, str]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts that see each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: `ip netns` makes the two hosts")
    tag = uuid.uuid4().hex[:6]
    names = (f"ip{tag}a", f"ip{tag}b")
    made: list[str] = []
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            made.append(name)
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1],
            "netns", names[1])  # fmt: skip
        addresses = ("10.213.7.1", "10.213.7.2")
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, addresses)
    finally:
        for name in made:
            _ip("netns", "delete", name)


@pytest.fixture
def begin(hosts: Hosts) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the script on one of the hosts; whatever runs there at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def on(host: int, *words: str) -> subprocess.Popen[str]:
        line = ["ip", "netns", "exec", hosts.names[host], str(SCRIPT)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "MASTER": hosts.addresses[0],
            "HOSTS": "2",
            "PROCESSES": "1",
        }
        started.append(
            subprocess.Popen(
                [*line, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield on
    for name in hosts.names:
        _lose_power(name)
    for process in started:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lose_power(name: str) -> None:
    """Kill all that runs on a host at once: the ranks stand in sessions of their own."""
    listed = subprocess.run(
        ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
    )
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (40, 10, 10, 3)).astype(np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 2)
    return path


def _losses(output: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(line["epoch"], line["loss"]) for line in lines if "loss" in line]


def _words(images: Path, output: Path, *more: str) -> list[str]:
    return ["digits", "--data", str(images), "--output", str(output), *TINY, *more]


@pytest.mark.timeout(300)
def test_two_hosts__train_as_two_processes_of_one(
    images: Path, tmp_path: Path, begin: Callable[..., Any], start: Callable[..., Any]
) -> None:
    alone = start(
        ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=127.0.0.1:0", "-m", "trainer.run",
         *_words(images, tmp_path / "one", "epochs=2")]
    )  # fmt: skip
    said, _ = alone.communicate(timeout=140)
    assert alone.returncode == 0, said
    words = _words(images, tmp_path / "two", "epochs=2")
    both = [begin(host, *words) for host in (0, 1)]
    for process in both:
        said, _ = process.communicate(timeout=140)
        assert process.returncode == 0, said
    assert len(_losses(tmp_path / "one")) == 2
    assert _losses(tmp_path / "two") == _losses(tmp_path / "one")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_hosts__one_lost_and_back_end_as_if_nothing_had_been(
    images: Path, tmp_path: Path, hosts: Hosts, begin: Callable[..., Any]
) -> None:
    more = ("epochs=40", "checkpoint.every_epochs=2")
    whole = [begin(host, *_words(images, tmp_path / "whole", *more)) for host in (0, 1)]
    for process in whole:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    words = _words(images, tmp_path / "cut", *more)
    first, second = (begin(host, *words) for host in (0, 1))
    for line in first.stdout:  # rank 0 speaks; either host may have it
        if "epoch 5/" in line:
            break
    else:
        pytest.skip("rank 0 was on the other host: it must be on the one that stays")
    _lose_power(hosts.names[1])
    second.communicate()
    second = begin(1, *words)
    ended = [process.communicate(timeout=250)[0] for process in (first, second)]
    said = "\n-- the other host --\n".join(ended)
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "going on from epoch-" in said
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "MASTER is not set"),
        ({"MASTER": "127.0.0.1"}, "HOSTS is '', wanted the number of hosts"),
        ({"MASTER": "127.0.0.1", "HOSTS": "none"}, "HOSTS is 'none'"),
        ({"MASTER": "127.0.0.1:port", "HOSTS": "1"}, "the port of MASTER=127.0.0.1:port is no"),
        ({"MASTER": "no.such.host.invalid", "HOSTS": "1"}, "cannot be reached from this host"),
    ],
)
def test_script__says_what_is_wrong(given: dict[str, str], told: str) -> None:
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("MASTER", "HOSTS")}
        | given
        | {"PYTHON": sys.executable}
    )
    done = subprocess.run(
        [str(SCRIPT), "digits"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
