"""A run that went wrong publishes nothing: no bundle, and the last good checkpoint stays newest.

Run: pytest tests/faults/test_unpublished.py
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from trainer import pretrain, step
from trainer.checkpoint import newest_checkpoint
from trainer.objective import Objective, objective
from trainer.run import main

# 4 steps an epoch, 3 epochs.
RECIPE = (
    "epochs=3",
    "batch_size=8",
    "device=cpu",
    "data.holdout=0",
    "encoder.image_size_px=8",
    "encoder.dim=8",
    "bank.num_neighbours=2",
    "loss.num_background=16",
    "loss.steps=2",
    "loss.num_positives=4",
    "loss.warmup_epochs=1",
    "monitor.every_epochs=1000",
    "checkpoint.every_epochs=1",
    "monitor.collapse_patience=1",
)


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Run the command; what it says on standard error."""
    images = tmp_path / "images.npz"
    draw = np.random.default_rng(0)
    np.savez(images, images=draw.integers(0, 256, (32, 10, 10, 3)).astype(np.uint8))

    def run() -> str:
        output = tmp_path / "run"
        assert main(["digits", "--data", str(images), "--output", str(output), *RECIPE]) == 1
        assert not (output / "bundle").exists()
        assert json.loads((output / "report.json").read_text())["status"] == "stopped"
        found = newest_checkpoint(output / "checkpoints", warn=pytest.fail)
        assert found is not None
        assert found.progress.position == (2, 4)
        for file in found.directory.glob("*.safetensors"):
            for tensor in safetensors.torch.load_file(file).values():
                assert tensor.isfinite().all()
        return capsys.readouterr().err

    return run


def _change_loss(
    monkeypatch: pytest.MonkeyPatch, at_step: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    calls: list[int] = []

    def changed(*arguments: Any, **named: Any) -> Objective:
        calls.append(1)
        found = objective(*arguments, **named)
        if len(calls) != at_step:
            return found
        return found._replace(instance=change(found.instance))

    monkeypatch.setattr(step, "objective", changed)


class SpoilsTheGradient(torch.autograd.Function):
    """Gives its input, and no number as its gradient."""

    @staticmethod
    def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


@pytest.mark.parametrize("at_step", [9, 11, 12])  # the first of the last epoch, in it, the last
def test_loss__that_is_no_number(
    train: Callable[[], str], monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    _change_loss(monkeypatch, at_step, lambda loss: loss * math.nan)
    assert "the loss is nan (instance nan, invariance" in train()


@pytest.mark.parametrize("at_step", [9, 12])
def test_gradient__that_is_no_number(
    train: Callable[[], str], monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    _change_loss(monkeypatch, at_step, SpoilsTheGradient.apply)
    assert "othing is published" in train()


def test_collapse(train: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []

    def collapsed(*arguments: Any, **named: Any) -> bool:
        epochs.append(1)
        return len(epochs) == 3

    monkeypatch.setattr(pretrain, "is_collapsed", collapsed)
    assert "COLLAPSE, epoch 3" in train()
