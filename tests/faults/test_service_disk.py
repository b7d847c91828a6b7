"""The disk under a service is full, or a file may grow no more; see the program beside this.

Run: pytest tests/faults/test_service_disk.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _run(*words: str) -> str:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fill_disk.py")), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 lost, searches answered, changes taken again" in ran.stdout
    return ran.stdout


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_full__file_system(small_disk: Path) -> None:
    assert "refused with 507" in _run("--directory", str(small_disk))


def test_full__limit_of_a_file(tmp_path: Path) -> None:
    assert "refused with 503" in _run("--limit-bytes", "1000000")
