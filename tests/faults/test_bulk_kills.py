"""Bulk embedding and loading, killed at random moments, end as one go does; see kill_bulk."""

from pathlib import Path

import pytest

from tests.faults.kill_bulk import prove


@pytest.mark.timeout(300)
def test_bulk__killed_now_and_then(tmp_path: Path) -> None:
    seen = prove(tmp_path, kills=2, seed=1)
    assert seen["kills"] >= 2


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_bulk__killed_often(tmp_path: Path) -> None:
    seen = prove(tmp_path, kills=60, seed=2)
    assert seen["kills of embed"] > 5
    assert seen["kills of load"] > 5
