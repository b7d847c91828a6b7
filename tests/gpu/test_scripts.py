"""The scripts for a GPU run to their end at toy size on a CPU.

Run: pytest tests/gpu/test_scripts.py
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.models import Info
from tests.gpu.serve import Answers, compared

HERE = Path(__file__).parent


def run(script: str, tmp_path: Path, *words: str) -> Any:
    """What a script has written at toy size."""
    output = tmp_path / "output.json"
    done = subprocess.run(
        [sys.executable, str(HERE / script), "--output", str(output), "--toy", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_bench_trainer__runs_at_toy_size(tmp_path: Path) -> None:
    measured = run("bench_trainer.py", tmp_path, "--device", "cpu")
    assert measured["facts"]["device"] == "cpu, toy sizes"
    correctness, *rows = measured["rows"]
    assert correctness["relative_difference_of_losses"] < 1e-3
    names = {row["benchmark"].split()[0] for row in rows}
    assert names == {"G1", "G3", "G4", "G6"}
    assert all(row["ms"] > 0 for row in rows if "ms" in row)


@pytest.mark.timeout(400)
def test_serve__runs_at_toy_size(tmp_path: Path) -> None:
    rows = run("serve.py", tmp_path, "--execution-provider", "cpu")["rows"]
    assert all(row["met"] for row in rows[:3])
    assert rows[1]["smallest_cosine"] > 0.999
    assert [row["images_per_s"] > 0 for row in rows if "images_per_s" in row] == [True] * 3


def test_serve__asks_for_the_gpu_and_for_the_same_answers() -> None:
    info = Info(
        **dict.fromkeys(field.name for field in dataclasses.fields(Info))  # of which two are read
        | {"execution_provider": "CPUExecutionProvider", "search": {"device": "cpu"}}
    )
    ones = np.ones((1, 4), np.float32) / 2
    cpu = Answers(info, ones, [{"a"}] * 1000)
    turned = ones * np.asarray([1, 1, 1, -1], np.float32)
    other = Answers(info, turned, [{"b"}] * 2 + [{"a"}] * 998)
    assert [row["met"] for row in compared(cpu, other, on_gpu=True)] == [False, False, False]
    assert [row["met"] for row in compared(cpu, cpu, on_gpu=False)] == [True, True, True]
