"""Nothing is sent anywhere, and no id of the machine is kept for who would send it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["service.embedder", "trainer.onnx_graph"])
def test_onnxruntime__reports_nothing(module: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, check=True)
    left = [str(path) for path in tmp_path.rglob("*") if "onnxruntime" in str(path)]
    assert left == []
