"""The CIFAR-10 script runs whole at toy size on the CPU, in slices.

Run: pytest tests/gpu/test_cifar10.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cifar10_pack import PACK

ROOT = Path(__file__).parents[2]


def call(output: Path, limit_s: float) -> str:
    command = [sys.executable, "tests/gpu/cifar10.py", "--output", str(output), "--toy"]
    command += ["--device", "cpu", "--arms", "instance", "--seeds", "0", "--limit-s", str(limit_s)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not PACK.is_file(), reason="the pack of CIFAR-10 is not beside this clone")
@pytest.mark.timeout(300)  # three real processes after one another
def test_cifar10__goes_on_after_a_slice_and_measures_the_last_epoch(tmp_path: Path) -> None:
    assert "not finished: instance-0" in call(tmp_path, 0.5)
    assert not (tmp_path / "instance-0" / "bundle").exists()
    said = call(tmp_path, 90)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"].values()
    assert (run["arm"], run["seed"], run["epochs"], run["device"]) == ("instance", 0, 2, "cpu")
    assert all(0 < run[key] < 1 for key in ("knn_features", "knn_embedding", "linear"))
    assert f"{run['linear']:.4f}" in said
    assert "not finished" not in said
