"""The scripts for a GPU run to their end at toy size on a CPU.

Run: pytest tests/gpu/test_scripts.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_bench_trainer__runs_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    words = ["--output", str(output), "--toy", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(HERE / "bench_trainer.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert measured["facts"]["device"] == "cpu, toy sizes"
    correctness, *rows = measured["rows"]
    assert correctness["relative_difference_of_losses"] < 1e-3
    names = {row["benchmark"].split()[0] for row in rows}
    assert names == {"G1", "G3", "G4", "G6"}
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
