"""The loop: what it does in which order, when it stops, and that a resumed run is the same run.

Run: pytest tests/trainer/test_pretrain.py
"""

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import checkpoint_writer, search
from trainer import engine as engine_module
from trainer import pretrain as module
from trainer import step as step_module
from trainer.checkpoint import Progress, checkpoints, newest_checkpoint
from trainer.config import Recipe
from trainer.datasets import open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import survey
from trainer.distributed import Ranks
from trainer.inspection import build_inspector
from trainer.interruption import Interrupted
from trainer.monitor import KnnMonitor
from trainer.objective import LossConfig, Objective, objective
from trainer.pretrain import Pretraining, TrainingFailed, pretrain
from trainer.readings import PARTS, Readings
from trainer.representation.preprocess import InputContract
from trainer.run_folder import Journal, RunFolder
from trainer.session import build
from trainer.step import loss_config
from trainer.stock import CropStock

TIMINGS = ("images_per_s", *(f"{part}_share" for part in PARTS))
Run = Callable[..., Pretraining]


@pytest.fixture
def run(tmp_path: Path, packed: Callable[..., Path], tiny_recipe: Callable[..., Recipe]) -> Any:
    """Build everything for a run of 40 images, 8 in a batch: 5 steps an epoch."""
    source = open_source(str(packed(40)))
    journals = []

    def make(folder: str, *overrides: str, before: Progress | None = None) -> Pretraining:
        recipe = tiny_recipe("data.holdout=0", *overrides)
        pool = DecodePool(0)
        found = survey(source, pool, recipe.data, size_px=8)
        (tmp_path / folder).mkdir(exist_ok=True)
        journals.append(
            Journal(RunFolder(tmp_path / folder), before.metrics if before else ()),
        )
        assert source.labels is not None
        images = np.stack([image[:8, :8] for image in found.stored or ()])
        return Pretraining(
            recipe=recipe,
            device=torch.device("cpu"),
            stock=CropStock(source, found.stored, pool, size_px=8, sizes=found.sizes),
            state=build(recipe, 40, torch.device("cpu")),
            monitor=KnnMonitor(images, source.labels, None, source.labels, k=3),
            journal=journals[-1],
            checkpoints=tmp_path / folder / "checkpoints",
            data_fingerprint="f00d",
            inspector=build_inspector(
                source,
                recipe.monitor,
                loss_config(recipe),
                InputContract(size_px=8),
                pool,
                seed=recipe.seed,
            ),
        )

    yield make
    for journal in journals:
        journal.__exit__(None, None, None)


def _tensors(run: Pretraining) -> list[torch.Tensor]:
    momenta = [values["momentum_buffer"] for values in run.state.optimiser.state.values()]
    return [
        *run.state.encoder.state_dict().values(),
        *run.state.bank.state_dict().values(),
        *momenta,
    ]


def _figures(run: Pretraining) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in run.journal.lines
    ]


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGINT while the `step`-th step of the run is computed."""
    real, calls = step_module.objective, []

    def counting(*arguments: Any) -> Objective:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(step_module, "objective", counting)


def test_same_seed_same_run(run: Run) -> None:
    one, other = run("one"), run("other")
    pretrain(one)
    torch.manual_seed(99)  # nothing is drawn from the global generator once all is built
    pretrain(other)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=True))
    assert _figures(one) == _figures(other)
    different = run("different", "seed=1")
    pretrain(different)
    assert _figures(different) != _figures(one)


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
    assert all(torch.equal(a, b) for a, b in zip(_tensors(whole), _tensors(second), strict=True))
    assert _figures(whole) == _figures(second)
    # What a file says afterwards is what the whole run says.
    lines = [
        path / "metrics.jsonl" for path in (whole.checkpoints.parent, second.checkpoints.parent)
    ]
    assert len({len(path.read_text().splitlines()) for path in lines}) == 1


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
    assert all(tensor.isfinite().all() for tensor in _tensors(made))


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
    assert all(torch.equal(a, b) for a, b in zip(_tensors(at_once), _tensors(made), strict=True))
    assert _figures(at_once) == _figures(made)

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
    assert all(torch.equal(a, b) for a, b in zip(_tensors(looked), _tensors(blind), strict=True))
    assert "inspected" not in blind.journal.lines[-1]
    seen = looked.journal.lines[-1]
    assert seen["inspected"] == 40
    assert 0 < seen["purity_hop_1"] <= 1
    assert seen["purity_chance"] == pytest.approx(19 / 39)
    common = [
        {name: value for name, value in line.items() if name in other}
        for line, other in zip(_figures(looked), _figures(blind), strict=True)
    ]
    assert common == _figures(blind)
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
    assert all(torch.equal(a, b) for a, b in zip(_tensors(whole), _tensors(second), strict=True))
    assert _figures(whole) == _figures(second)
