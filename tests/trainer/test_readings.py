"""Steps are read some at a time; time is told apart by what it went to.

Run: pytest tests/trainer/test_readings.py
"""

import pytest
import torch

from trainer import readings as module
from trainer.distributed import ALONE
from trainer.readings import Clock, Readings, bound_by
from trainer.schedule import Position
from trainer.step import FIGURES

CPU = torch.device("cpu")


def _figures(loss: float) -> torch.Tensor:
    return torch.tensor([loss, *[0.0] * len(FIGURES)])


def test_readings__come_together_and_in_order() -> None:
    readings = Readings(CPU, ALONE, until=3)
    assert readings.read() == []
    for step in (1, 2, 3):
        assert not readings.due
        readings.add(Position(1, step), _figures(step / 2))
        readings.keep_pace()
    assert readings.due
    found = readings.read()
    assert [each.position for each in found] == [(1, 1), (1, 2), (1, 3)]
    assert [each.figures.means["loss"] for each in found] == [0.5, 1.0, 1.5]
    assert not readings.due
    readings.add(Position(1, 4), _figures(7))
    (last,) = readings.read()  # before it is due, as at an epoch's end
    assert last.figures.means["loss"] == 7


def test_readings__on_a_cpu_are_read_at_once() -> None:
    readings = Readings(CPU, ALONE)
    for step in (1, 2):
        readings.add(Position(1, step), _figures(1))
        assert readings.due
        assert len(readings.read()) == 1


def test_clock__tells_apart_what_time_went_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    clock = Clock()
    for part, seconds in (("loader", 1.0), ("device", 6.0), ("host", 0.5), ("loader", 0.5)):
        now[0] += seconds
        clock.lap(part)  # type: ignore[arg-type]
    assert clock.take() == {"loader": 1.5, "host": 0.5, "device": 6.0}
    now[0] += 2
    clock.lap("host")
    assert clock.take() == {"loader": 0.0, "host": 2.0, "device": 0.0}


def test_bound_by__names_the_largest_share() -> None:
    shares = {"loader": 0.7, "host": 0.1, "device": 0.2}
    assert bound_by(shares) == "bound by the loader (70%; device 20%, host 10%)"
