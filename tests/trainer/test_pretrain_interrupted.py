"""The loop, stopped at any step or while accuracy is measured: the resumed run is the same run.

Run: pytest tests/trainer/test_pretrain_interrupted.py
"""

import signal
from typing import Any

import pytest
import torch

from tests.trainer.pretraining import Run, figures_of, tensors_of
from trainer import step as step_module
from trainer.checkpoint import newest_checkpoint
from trainer.interruption import Interrupted
from trainer.monitor import KnnMonitor
from trainer.objective import Objective
from trainer.pretrain import pretrain


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGINT while the `step`-th step of the run is computed."""
    real, calls = step_module.objective, []

    def counting(*arguments: Any) -> Objective:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(step_module, "objective", counting)


@pytest.mark.parametrize("step", [1, 3, 5, 7, 10])  # 5 and 10 are ends of an epoch
def test_resume__after_an_interruption_is_the_same_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = run("whole")
    pretrain(whole)

    first = run("cut")
    with monkeypatch.context() as patch:
        _interrupt_at(patch, step)
        with pytest.raises(Interrupted, match="--resume") as stopped:
            pretrain(first)
    assert stopped.value.signum == signal.SIGINT
    found = newest_checkpoint(first.checkpoints, warn=pytest.fail)
    assert found is not None
    assert found.progress.position == ((step - 1) // 5 + 1, (step - 1) % 5 + 1)

    second = run("cut", before=found.progress)
    torch.manual_seed(99)
    found.restore(second.state)
    pretrain(second, found.progress)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors_of(whole), tensors_of(second), strict=True)
    )
    assert figures_of(whole) == figures_of(second)
    # What a file says afterwards is what the whole run says.
    lines = [
        path / "metrics.jsonl" for path in (whole.checkpoints.parent, second.checkpoints.parent)
    ]
    assert len({len(path.read_text().splitlines()) for path in lines}) == 1


@pytest.mark.parametrize(("measurement", "position"), [(1, (1, 0)), (2, (1, 5)), (3, (2, 5))])
def test_stop__while_accuracy_is_measured_gives_that_up_until_resumed(
    run: Run, monkeypatch: pytest.MonkeyPatch, measurement: int, position: tuple[int, int]
) -> None:
    whole = run("whole")
    pretrain(whole)

    first = run("cut")
    calls: list[int] = []
    real = KnnMonitor.measure

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == measurement:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(KnnMonitor, "measure", interrupted)
        with pytest.raises(Interrupted) as stopped:
            pretrain(first)
    assert stopped.value.signum == signal.SIGTERM
    assert len(first.journal.lines) == measurement - 1
    found = newest_checkpoint(first.checkpoints, warn=pytest.fail)
    assert found is not None
    assert found.progress.position == position

    second = run("cut", before=found.progress)
    found.restore(second.state)
    pretrain(second, found.progress)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors_of(whole), tensors_of(second), strict=True)
    )
    assert figures_of(whole) == figures_of(second)
