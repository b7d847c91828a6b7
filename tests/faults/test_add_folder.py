"""The small form of kill_add_folder.py; the long one has thousands of pictures."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("kill_add_folder.py")


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("kill_add_folder", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_add_folder__killed_at_random_ends_complete(program: Any, tmp_path: Path) -> None:
    seen = program.prove(tmp_path, images=400, kills=3, seed=1)
    assert seen["kills"] >= 2
    assert seen["written twice"] == 0
