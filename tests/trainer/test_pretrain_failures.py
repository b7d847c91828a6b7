"""What ends the loop with a reason: no numbers, a collapse, a full disk; a good checkpoint stays.

Run: pytest tests/trainer/test_pretrain_failures.py
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.pretraining import Run, figures_of, tensors_of
from trainer import checkpoint_writer, search
from trainer import engine as engine_module
from trainer import pretrain as module
from trainer import step as step_module
from trainer.checkpoint import checkpoints, newest_checkpoint
from trainer.distributed import Ranks
from trainer.monitor import KnnMonitor
from trainer.objective import Objective, objective
from trainer.pretrain import TrainingFailed, pretrain
from trainer.readings import Readings


def test_loss__that_is_no_number_stops_and_leaves_the_last_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def poisoned(*arguments: Any) -> Objective:
        calls.append(1)
        found = objective(*arguments)
        return found._replace(instance=found.instance * torch.nan) if len(calls) == 8 else found

    monkeypatch.setattr(step_module, "objective", poisoned)
    made = run("nan")
    with pytest.raises(TrainingFailed, match=r"the loss is nan .* in epoch 2, step 3"):
        pretrain(made)
    assert [path.name for path in checkpoints(made.checkpoints)] == ["epoch-0001-step-000005"]
    found = newest_checkpoint(made.checkpoints, warn=pytest.fail)
    assert found is not None
    found.restore(made.state)
    assert all(tensor.isfinite().all() for tensor in tensors_of(made))


@pytest.mark.parametrize("window", [2, 5, 32])
def test_readings__seldom_change_nothing_but_when_it_is_noticed(
    run: Run, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    at_once = run("at-once")
    pretrain(at_once)

    def seldom(device: torch.device, ranks: Ranks) -> Readings:
        readings = Readings(device, ranks, until=window)
        monkeypatch.setattr(Readings, "launches", "host")  # as on a GPU
        return readings

    monkeypatch.setattr(engine_module, "Readings", seldom)
    made = run("seldom")
    pretrain(made)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors_of(at_once), tensors_of(made), strict=True)
    )
    assert figures_of(at_once) == figures_of(made)

    calls: list[int] = []

    def poisoned(*arguments: Any) -> Objective:
        calls.append(1)
        found = objective(*arguments)
        return found._replace(instance=found.instance * torch.nan) if len(calls) == 8 else found

    monkeypatch.setattr(step_module, "objective", poisoned)
    # The steps until the next reading work on what is no number, as on a GPU.
    monkeypatch.setattr(search, "_top_m_on_cpu", search._top_m_on_device)
    spoilt = run("spoilt")
    with pytest.raises(TrainingFailed, match=r"the loss is nan .* in epoch 2, step 3"):
        pretrain(spoilt)
    assert len(calls) == {2: 9, 5: 10, 32: 10}[window]  # 2: the fourth step of the epoch is read
    assert [path.name for path in checkpoints(spoilt.checkpoints)] == ["epoch-0001-step-000005"]


def test_inspection__that_finds_no_numbers_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run("nan", "epochs=1")
    real = module._check_equal

    def spoiling(*arguments: Any) -> None:
        real(*arguments)
        next(made.state.encoder.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(module, "_check_equal", spoiling)
    monkeypatch.setattr(KnnMonitor, "measure", lambda *_: 0.5)
    with pytest.raises(TrainingFailed, match="no numbers after epoch 1; nothing is published"):
        pretrain(made)
    assert not checkpoints(made.checkpoints)


def test_collapse__is_said_each_epoch_and_stops_after_the_patience(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run("collapse", "epochs=9", "monitor.collapse_patience=3", "encoder.normalise=false")
    head = made.state.encoder.head[-1]  # type: ignore[index]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(1.0)
    for parameter in made.state.encoder.parameters():
        parameter.requires_grad_(parameter is head.bias)
    # All embeddings are equal: the bank's rows follow, and every similarity becomes equal.
    made.state.bank.embeddings.copy_(torch.full((40, 8), 1 / math.sqrt(8)))
    with pytest.raises(TrainingFailed, match=r"COLLAPSE, epoch 3.*normalise=true.*after 3 such"):
        pretrain(made)
    assert [line["collapsed"] for line in made.journal.lines[1:]] == [True] * 3
    said = capsys.readouterr().out
    assert "COLLAPSE, epoch 1" in said
    assert "stops after 1 more" in said


@pytest.mark.parametrize("breaks", [1, 2])  # the second one is begun after the last step
def test_checkpoint__that_cannot_be_written_ends_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, breaks: int
) -> None:
    real, calls = checkpoint_writer.write_checkpoint, []

    def full(*arguments: Any) -> Path:
        calls.append(1)
        if len(calls) == breaks:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", full)
    made = run("full", "epochs=2" if breaks == 2 else "epochs=60")
    good = "there is none yet" if breaks == 1 else "last good.*epoch-0001-step-000005"
    told = rf"epoch {breaks}, step 5 cannot be written \(No space left.*{good}"
    with pytest.raises(TrainingFailed, match=told):
        pretrain(made)
    assert len(calls) == breaks
    assert len(made.journal.lines) < 60


def test_gradient__that_is_no_number_in_the_last_step_is_not_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run("gradient", "monitor.every_epochs=9")
    calls: list[int] = []

    def counting(*arguments: Any) -> Objective:
        calls.append(1)
        return objective(*arguments)

    monkeypatch.setattr(step_module, "objective", counting)
    weight = next(made.state.encoder.parameters())
    weight.register_hook(lambda gradient: gradient * (torch.nan if len(calls) == 10 else 1))
    made = dataclasses.replace(made, monitor=None, inspector=None)
    told = r"epoch 2, step 5 cannot be written \('backbone.* are no numbers.*epoch-0001-step-000005"
    with pytest.raises(TrainingFailed, match=told):
        pretrain(made)
    assert all(math.isfinite(line["loss"]) for line in made.journal.lines)
    assert [path.name for path in checkpoints(made.checkpoints)] == ["epoch-0001-step-000005"]
