"""Hostile requests and slow senders against a real service; see the programs beside this.

They run as programs: they fork a service, which a process with threads must not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzzed_requests import generate

SEED = 20261126


def _run(program: str, *words: object) -> str:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


LONG = [pytest.mark.long, pytest.mark.timeout(1800)]
SLOW_MACHINE = pytest.mark.timeout(400)


@pytest.mark.parametrize(
    ("count", "answer_s"),
    [pytest.param(300, 40, marks=SLOW_MACHINE), pytest.param(3000, 3, marks=LONG)],
)
def test_hostile_requests__harm_nobody(count: int, answer_s: float) -> None:
    words = ("--requests", count, "--seed", SEED, "--answer-s", answer_s)
    assert f"seed {SEED}: {count} requests" in _run("hostile_bodies.py", *words)


@pytest.mark.parametrize(
    ("sockets", "words"),
    [
        pytest.param(60, ("--timeouts-s", 1), marks=SLOW_MACHINE),
        pytest.param(500, (), marks=LONG),
    ],
)
def test_slow_sockets__are_closed_and_harm_nobody(sockets: int, words: tuple[object, ...]) -> None:
    said = _run("slow_senders.py", "--sockets", sockets, *words)
    assert "failures 0" in said
    assert "still open 0" in said


def test_generator__is_repeatable_and_makes_every_kind() -> None:
    first, again = generate(5, 400), generate(5, 400)
    assert [h.pieces[0] for h in first] == [h.pieces[0] for h in again]
    assert {h.kind for h in first} == {
        "broken json", "mutated json", "ndjson", "multipart", "npy", "picture", "query", "wire",
        "raw tensors", "large",
    }  # fmt: skip
