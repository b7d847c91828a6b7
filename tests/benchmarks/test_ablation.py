"""The ablation's arms run whole at toy size, so that the program stays true to the trainer.

Run: pytest tests/benchmarks/test_ablation.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cifar10_pack import PACK

ROOT = Path(__file__).parents[2]
ARMS = ("instance", "easy", "mutual", "refresh", "by_hop", "two_views")  # of every kind


@pytest.mark.skipif(not PACK.is_file(), reason="the pack of CIFAR-10 is not beside this clone")
@pytest.mark.timeout(300)
def test_ablation__runs_at_toy_size_and_compares_equal_seeds(tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    size = ["--images", "300", "--test-images", "100", "--epochs", "2", "--seeds", "3"]
    words = ["run", "--arms", *ARMS, *size, "--output", str(runs)]

    def ablation(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "tests/benchmarks/ablation.py", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    ablation(*words)
    found = {run["arm"]: run for run in map(json.loads, runs.read_text().splitlines())}
    assert tuple(found) == ARMS
    for run in found.values():
        # One network and one seed for all; what was trained differs.
        assert run["lines"][0] == found["instance"]["lines"][0]
        assert 0 <= run["lines"][-1]["knn"] <= 1
    losses = {run["lines"][-1]["instance"] for run in found.values()}
    assert len(losses) >= len(ARMS) - 1  # at this size two graphs may chance to be equal
    gain = found["easy"]["lines"][-1]["knn"] - found["instance"]["lines"][-1]["knn"]
    assert f"{100 * gain:+.2f} points" in ablation("report", str(runs))
