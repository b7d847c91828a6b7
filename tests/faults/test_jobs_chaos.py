"""A small form of chaos_jobs.py: 20 evaluations, their workers killed, none lost or done twice."""

import pytest

from tests.faults.brokers import missing
from tests.faults.chaos_jobs import run

LONG = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("broker", "jobs", "pause_s"),
    [
        # A minute alone, half as long again beside other work.
        pytest.param("filesystem", 20, 0, marks=pytest.mark.timeout(400)),
        pytest.param("filesystem", 500, 0, marks=LONG),
        pytest.param("redis", 500, 60, marks=LONG),
        pytest.param("amqp", 500, 60, marks=LONG),
    ],
)
def test_evaluations__all_end_once_under_chaos(broker: str, jobs: int, pause_s: float) -> None:
    if (wanted := missing(broker)) is not None:
        pytest.skip(f"there is no {wanted}")
    small = jobs == 20
    found = run(
        jobs=jobs,
        broker=broker,
        workers=2,
        seed=jobs,
        pause_s=pause_s,
        every_s=1.5 if small else 3,
        end_s=100 if small else 900,
    )
    assert found["wrong"] == []
    assert found["jobs"] >= jobs
    assert found["faults"]  # something was
