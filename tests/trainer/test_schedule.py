"""Rates, weights and orders by hand. Run: pytest tests/trainer/test_schedule.py"""

import numpy as np
import pytest
import torch

from trainer.config import OptimConfig
from trainer.schedule import (
    epoch_batches,
    invariance_weight,
    learning_rate,
    steps_per_epoch,
    view_generator,
)


def _optim(schedule: str, milestones: tuple[int, ...] = ()) -> OptimConfig:
    return OptimConfig.model_validate(
        {
            "lr": 0.03,
            "momentum": 0.9,
            "weight_decay": 0,
            "schedule": schedule,
            "milestones": milestones,
            "gamma": 0.1,
        }
    )


def test_learning_rate__cosine() -> None:
    rates = [learning_rate(_optim("cosine"), epoch, 4) for epoch in (1, 2, 3, 4)]
    # 1 + cos of 0, 45, 90 and 135 degrees, times 0.015.
    assert rates == pytest.approx([0.03, 0.0256066, 0.015, 0.0043934])


def test_learning_rate__official_cosine_is_an_epoch_ahead() -> None:
    rates = [learning_rate(_optim("official_cosine"), epoch, 3) for epoch in (1, 2, 3)]
    # Of the 4 epochs 0..3 the released code runs 1..3: 45, 90 and 135 degrees.
    assert rates == pytest.approx([0.0256066, 0.015, 0.0043934])


def test_learning_rate__step() -> None:
    config = _optim("step", (2, 3))
    rates = [learning_rate(config, epoch, 10) for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003])


def test_invariance_weight__begins_after_the_warm_up() -> None:
    assert [invariance_weight(0.6, epoch, 30) for epoch in (1, 30, 31)] == [0.0, 0.0, 0.6]
    assert invariance_weight(0.6, 1, 0) == 0.6


def test_epoch_batches__hold_each_image_at_most_once_and_drop_the_rest() -> None:
    batches = epoch_batches(0, 1, 10, 3)
    assert batches.shape == (steps_per_epoch(10, 3), 3) == (3, 3)
    assert len(np.unique(batches)) == 9
    assert batches.min() >= 0
    assert batches.max() <= 9


def test_epoch_batches__depend_on_seed_and_epoch_alone() -> None:
    first = epoch_batches(0, 1, 50, 50)
    assert (first == epoch_batches(0, 1, 50, 50)).all()
    assert (first != epoch_batches(0, 2, 50, 50)).any()
    assert (first != epoch_batches(1, 1, 50, 50)).any()


def test_view_generator__is_another_for_each_seed_epoch_and_step() -> None:
    keys = [(0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1)]
    draws = {float(torch.rand((), generator=view_generator(*key))) for key in keys}
    assert len(draws) == 4
    assert float(torch.rand((), generator=view_generator(0, 1, 1))) in draws
