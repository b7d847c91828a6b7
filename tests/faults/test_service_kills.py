"""A service that is killed at random moments holds what it answered; see the program beside this.

Run: pytest tests/faults/test_service_kills.py     --long: 1,000 kills
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(50, marks=pytest.mark.timeout(400)),
        pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_kills__lose_nothing_that_was_answered(kills: int) -> None:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_service.py")), "--kills", str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{kills} kills: 0 lost, 0 torn, 0 resurrected" in ran.stdout
