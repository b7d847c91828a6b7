"""A service that is killed or stopped at random moments; see the programs beside this.

Run: pytest tests/faults/test_service_ends.py     --long: 1,000 kills, 50 stops
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _run(program: str, *words: str) -> str:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


LONG = [pytest.mark.long, pytest.mark.timeout(3600)]
SLOW_MACHINE = pytest.mark.timeout(400)


@pytest.mark.parametrize(
    "kills", [pytest.param(50, marks=SLOW_MACHINE), pytest.param(1000, marks=LONG)]
)
def test_kills__lose_nothing_that_was_answered(kills: int) -> None:
    said = _run("kill_service.py", "--kills", str(kills))
    assert f"{kills} kills: 0 lost, 0 torn, 0 resurrected" in said


@pytest.mark.parametrize(
    "stops", [pytest.param(8, marks=SLOW_MACHINE), pytest.param(50, marks=LONG)]
)
def test_stops__answer_every_request_that_was_taken(stops: int) -> None:
    said = _run("stop_service.py", "--stops", str(stops))
    assert f"{stops} stops: every request that was taken was answered, 0 lost" in said
