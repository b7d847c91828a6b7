"""The scripts for a GPU run to their end at toy size on a CPU.

Run: pytest tests/gpu/test_scripts.py
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.gpu.serve import Answers, compared

HERE = Path(__file__).parent


@dataclass
class FakeInfo:
    """What is read of /info."""

    execution_provider: str
    search: dict[str, str]


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


def test_serve__runs_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    words = ["--output", str(output), "--toy", "--execution-provider", "cpu"]
    done = subprocess.run(
        [sys.executable, str(HERE / "serve.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert all(row["met"] for row in rows[:3])
    assert rows[1]["smallest_cosine"] > 0.999
    assert [row["images_per_s"] > 0 for row in rows if "images_per_s" in row] == [True] * 3


def test_serve__asks_for_the_gpu_and_for_the_same_answers() -> None:
    info = FakeInfo("CPUExecutionProvider", {"device": "cpu"})
    ones = np.ones((1, 4), np.float32) / 2
    cpu = Answers(info, ones, [{"a"}] * 1000)  # type: ignore[arg-type]
    turned = ones * np.asarray([1, 1, 1, -1], np.float32)
    other = Answers(info, turned, [{"b"}] * 2 + [{"a"}] * 998)  # type: ignore[arg-type]
    assert [row["met"] for row in compared(cpu, other, on_gpu=True)] == [False, False, False]
    assert [row["met"] for row in compared(cpu, cpu, on_gpu=False)] == [True, True, True]
