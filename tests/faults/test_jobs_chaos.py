"""A small form of chaos_jobs.py: 20 evaluations, their workers killed, none lost or done twice."""

import shutil

import pytest

from tests.faults.chaos_jobs import run


@pytest.mark.parametrize(
    ("broker", "jobs", "pause_s"),
    [
        ("filesystem", 20, 0),
        pytest.param("filesystem", 500, 0, marks=[pytest.mark.long, pytest.mark.timeout(2400)]),
        pytest.param("redis", 500, 60, marks=[pytest.mark.long, pytest.mark.timeout(2400)]),
    ],
)
def test_evaluations__all_end_once_under_chaos(broker: str, jobs: int, pause_s: float) -> None:
    if broker == "redis" and shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server")
    end_s = 100 if jobs == 20 else 1800
    found = run(
        jobs=jobs, broker=broker, workers=2, seed=jobs, pause_s=pause_s, every_s=6, end_s=end_s
    )
    assert found["wrong"] == []
    assert sum(found["ended"].values()) == jobs
    assert found["ended"]["succeeded"] >= 0.9 * jobs
    assert found["broken"]  # something was
