"""A state directory or a bundle that was damaged on disk; see the program beside this.

Run: pytest tests/faults/test_service_damage.py     --long: a larger state, more of it
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("items", "per_block", "lengths"),
    [
        pytest.param(60, 2, 3, marks=pytest.mark.timeout(400)),
        pytest.param(2000, 4, 60, marks=LONG),
    ],
)
def test_damage__is_named_or_harmless(items: int, per_block: int, lengths: int) -> None:
    words = ("--items", items, "--flips-per-block", per_block, "--lengths", lengths)
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("flip_state.py")), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "damages, 0 wrong answers" in ran.stdout
    # Both happen: what is named, and what lies where nothing is.
    (log,) = [line for line in ran.stdout.splitlines() if ".sqlite3`" in line]
    assert "flips: named " in log
    assert "flips: harmless " in log
