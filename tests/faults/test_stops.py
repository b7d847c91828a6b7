"""Processes that are killed, stopped or frozen at random moments; see the programs beside this.

Run: pytest tests/faults/test_stops.py     --long: 200 kills of a saver, 50 stops of a run
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(program: str, *words: str, timeout_s: int) -> str:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_kills__of_a_saver(kills: int) -> None:
    said = _run("kill_savers.py", "--kills", str(kills), timeout_s=1800)
    assert f"{kills} kills" in said
    assert "0 torn, 0 lost" in said


LONG = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("signal", "processes", "rounds"),
    [
        pytest.param("TERM", 1, 3, marks=pytest.mark.timeout(400)),
        pytest.param("TERM", 1, 50, marks=LONG),
        pytest.param("TERM", 2, 50, marks=LONG),
        pytest.param("KILL", 1, 20, marks=LONG),
        pytest.param("KILL", 2, 20, marks=LONG),
        pytest.param("STOP", 2, 5, marks=LONG),
    ],
)
def test_run__that_is_stopped_again_and_again_ends_as_if_left_in_peace(
    signal: str, processes: int, rounds: int
) -> None:
    words = ("--signal", signal, "--processes", str(processes), "--rounds", str(rounds))
    said = _run("stop_runs.py", *words, timeout_s=3600)
    assert f"signals: {rounds}" in said
