"""The loop: what it does in which order, what it writes down, and that the seed decides all of it.

Run: pytest tests/trainer/test_pretrain.py
"""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.pretraining import Run, figures_of, tensors_of
from trainer import step as step_module
from trainer.objective import LossConfig, Objective, objective
from trainer.pretrain import TrainingFailed, pretrain
from trainer.readings import PARTS
from trainer.run_folder import RunFolder


def test_same_seed_same_run(run: Run) -> None:
    one, other = run("one"), run("other")
    pretrain(one)
    torch.manual_seed(99)  # nothing is drawn from the global generator once all is built
    pretrain(other)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
    assert figures_of(one) == figures_of(other)
    different = run("different", "seed=1")
    pretrain(different)
    assert figures_of(different) != figures_of(one)


def test_bf16__trains_with_finite_figures(run: Run) -> None:
    # At 8 px the last convolution sees 1 x 1, and torch 2.14 leaves the gradient of the weights
    # that lie outside of it as the memory was (bf16 on a CPU): sometimes no number.
    made = dataclasses.replace(
        run("bf16", "precision=bf16", "encoder.image_size_px=16"), monitor=None, inspector=None
    )
    pretrain(made)
    assert all(math.isfinite(line["loss"]) for line in made.journal.lines[1:])


def test_bank__is_updated_after_the_step_with_what_came_before_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run("order", "epochs=1")
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def spying(bank: Any, indices: Any, embeddings: Any, config: LossConfig) -> Objective:
        found = objective(bank, indices, embeddings, config)
        seen.append((indices, embeddings.detach().clone(), bank.embeddings.clone()))
        return found

    monkeypatch.setattr(step_module, "objective", spying)
    pretrain(made)
    (indices, embeddings, before), (_, _, after) = seen[:2]
    wanted = before.clone()
    wanted[indices] = torch.nn.functional.normalize(0.5 * before[indices] + 0.5 * embeddings)
    assert torch.allclose(after, wanted, atol=1e-6)
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[indices] = False
    assert torch.equal(after[untouched], before[untouched])
    assert (made.state.bank.neighbours >= 0).all()  # one epoch visits every image


def test_invariance_loss__is_left_out_during_the_warm_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(*arguments: Any) -> Objective:
        found = objective(*arguments)
        return found._replace(invariance=found.invariance * torch.inf)

    monkeypatch.setattr(step_module, "objective", infinite)
    made = run("warm", "loss.warmup_epochs=1")
    with pytest.raises(TrainingFailed, match=r"the loss is inf .* in epoch 2, step 1"):
        pretrain(made)
    assert math.isfinite(made.journal.lines[-1]["loss"])


def test_loss__is_instance_plus_weighted_invariance(run: Run) -> None:
    made = run("sum", "loss.invariance_weight=0.25")
    pretrain(made)
    warm, joined = made.journal.lines[1:]
    assert warm["loss"] == warm["instance"]
    assert joined["invariance"] > 0.1
    assert joined["loss"] == pytest.approx(joined["instance"] + 0.25 * joined["invariance"])


def test_metrics__of_every_epoch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made = run("metrics", "optim.schedule=step", "optim.milestones=[1]")
    pretrain(made)
    assert "images/s, bound by the device (" in capsys.readouterr().out
    untrained, first, second = made.journal.lines
    assert set(untrained) == {"epoch", "knn"}
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["lr"], second["lr"]) == pytest.approx((0.03, 0.003))
    assert made.state.optimiser.param_groups[0]["lr"] == second["lr"]
    assert 0 < second["reached"] <= 6  # 2 neighbours, then 4 of theirs
    assert 0 < second["hard_share"] <= 1
    assert second["images_per_s"] > 0
    shares = [second[f"{part}_share"] for part in PARTS]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert second["device_share"] > 0.3  # the computation, on a CPU
    assert {"knn", "instance", "invariance", "spread", "collapsed"} <= set(second)


def test_inspection__changes_no_number_of_the_training(run: Run) -> None:
    looked, blind = run("looked"), run("blind", "monitor.max_anchors=0")
    pretrain(looked)
    pretrain(blind)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors_of(looked), tensors_of(blind), strict=True)
    )
    assert "inspected" not in blind.journal.lines[-1]
    seen = looked.journal.lines[-1]
    assert seen["inspected"] == 40
    assert 0 < seen["purity_hop_1"] <= 1
    assert seen["purity_chance"] == pytest.approx(19 / 39)
    common = [
        {name: value for name, value in line.items() if name in other}
        for line, other in zip(figures_of(looked), figures_of(blind), strict=True)
    ]
    assert common == figures_of(blind)
    folder = RunFolder(looked.checkpoints.parent)
    assert json.loads(folder.histograms.read_text().splitlines()[-1]) == {
        "epoch": 2,
        **seen["histograms"],
    }
    assert "histograms" not in folder.metrics.read_text()
    assert json.loads(folder.pictures.read_text())["epoch"] == 2
    tags = EventAccumulator(str(folder.tensorboard)).Reload().Tags()
    assert {"positives/reached", "purity/purity_chosen", "losses/instance"} <= set(tags["scalars"])
    assert {"similarity_of/hard", "similarity_of/background"} <= set(tags["histograms"])
