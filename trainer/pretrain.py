"""The training loop: views -> embeddings -> objective -> step -> bank and graph -> metrics, state.

In: everything already built. Out: a trained encoder in place, the journal's lines, checkpoints; or
an exception that says why training stopped. Every rank runs it and all do the same; the bank is
written with the joined batch in its order, so that all banks stay equal.
"""

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from trainer.checkpoint import Progress as SavedProgress
from trainer.checkpoint import Retention, TrainingState
from trainer.checkpoint_writer import CheckpointNotWritten, CheckpointWriter
from trainer.config import Recipe
from trainer.distributed import ALONE, Ranks
from trainer.engine import Engine, build_engine
from trainer.fingerprints import digest
from trainer.inspection import Inspector
from trainer.interruption import Interrupted, StopAsked, StopRequest
from trainer.monitor import KnnMonitor, is_collapsed
from trainer.pictures import pictures
from trainer.progress import Progress, say
from trainer.readings import PARTS, Clock, EpochSums, Reading, bound_by
from trainer.run_folder import HISTOGRAMS, Journal, Metrics
from trainer.schedule import (
    Position,
    epoch_batches,
    invariance_weight,
    learning_rate,
    steps_per_epoch,
)
from trainer.sharded_bank import replicated, whole_state
from trainer.step import StepFigures
from trainer.stock import CropStock

# What a rank asks of all besides signals, above the number of any: its checkpoint was not written.
WRITE_FAILED = 1000


class TrainingFailed(Exception):
    """Training that must not go on; nothing is published. The message says what to do."""


@dataclass(frozen=True)
class Pretraining:
    """All that the loop needs, built beforehand."""

    recipe: Recipe
    device: torch.device
    stock: CropStock  # N images to take crops from
    state: TrainingState
    monitor: KnnMonitor | None
    journal: Journal
    checkpoints: Path
    data_fingerprint: str
    inspector: Inspector | None = None
    ranks: Ranks = ALONE

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return steps_per_epoch(len(self.stock), self.recipe.batch_size)

    @cached_property
    def writer(self) -> CheckpointWriter:
        """Of the checkpoints; only rank 0 has something to write."""
        config = self.recipe.checkpoint
        retention = Retention(config.keep, config.keep_every_epochs, self.steps)
        return CheckpointWriter(self.checkpoints, retention)

    def begin_save(self, position: Position, running: EpochSums) -> None:
        """Begin to write a checkpoint of everything, on rank 0; no rank waits for the disk."""
        bank = whole_state(self.state.bank, self.ranks)
        if not self.ranks.is_first:
            return
        progress = SavedProgress(
            position=position,
            recipe=self.recipe.as_dict(),
            data_fingerprint=self.data_fingerprint,
            running=running.as_dict(),
            metrics=self.journal.lines,
        )
        self.writer.save(self.state, progress, bank=bank)

    def finish_save(self) -> Path | None:
        """Wait, on all ranks, until the checkpoint that was begun last is whole; say where it is.

        Raises:
            TrainingFailed: it or the one before cannot be written; the last good one stays.
        """
        return self.ranks.from_first(self._written)

    def _written(self) -> Path | None:
        try:
            return self.writer.wait()
        except CheckpointNotWritten as error:
            raise TrainingFailed(str(error)) from error

    def wish(self, stop: StopRequest) -> int:
        """What this rank asks of all: the signal it got, WRITE_FAILED, or 0 to go on."""
        if self.ranks.is_first and self.writer.failed:
            return WRITE_FAILED
        return stop.signum or 0


def pretrain(run: Pretraining, resumed: SavedProgress | None = None) -> None:
    """Train from the beginning, or from where `resumed` was saved, to the last epoch.

    Raises:
        Interrupted: a signal asked for a stop; a checkpoint was written.
        TrainingFailed: a loss that is not finite, collapse, or a checkpoint that cannot be written.
    """
    position, sums = Position(1, 0), EpochSums()
    if resumed is not None:
        position, sums = resumed.position, EpochSums(**resumed.running)
        # Of the end of an epoch that was not measured any more, that is still to be done.
        measured = bool(run.journal.lines) and run.journal.lines[-1]["epoch"] == position.epoch
        if position.step == run.steps and measured:
            position, sums = Position(position.epoch + 1, 0), EpochSums()
    done = ((position.epoch - 1) * run.steps + position.step) * run.recipe.batch_size
    total = run.recipe.epochs * run.steps * run.recipe.batch_size
    ranks, encoder = run.ranks, run.state.encoder
    joint = run.recipe.distributed.sync_batchnorm
    with (
        StopRequest(alone=ranks.size == 1, speaks=ranks.is_first) as stop,
        run.writer,
        ranks.network(encoder, sync_batchnorm=joint) as network,
    ):
        if not run.journal.lines:
            with _leaving(run, position, sums, stop):
                _measure_untrained(run, stop)
        engine = build_engine(
            run.recipe,
            run.stock,
            run.state,
            network,
            ranks,
            run.device,
            asked=lambda: run.wish(stop),
        )
        with Progress("training", total, done=done) as progress:
            for epoch in range(position.epoch, run.recipe.epochs + 1):
                _train_epoch(run, engine, Position(epoch, position.step), sums, progress)
                _check_equal(run, epoch)
                with _leaving(run, Position(epoch, run.steps), sums, stop):
                    _finish_epoch(run, epoch, sums, stop)
                position, sums = Position(epoch + 1, 0), EpochSums()
        run.finish_save()


def _train_epoch(
    run: Pretraining, engine: Engine, start: Position, sums: EpochSums, progress: Progress
) -> None:
    recipe, epoch = run.recipe, start.epoch
    engine.step.set_rate(learning_rate(recipe.optim, epoch, recipe.epochs))
    weight = invariance_weight(recipe.loss.invariance_weight, epoch, recipe.loss.warmup_epochs)
    run.state.encoder.train()
    batches = epoch_batches(recipe.seed, epoch, len(run.stock), recipe.batch_size)[start.step :]
    readings, clock = engine.readings, Clock()
    with closing(engine.feed.epoch(batches, start)) as fed:
        for step, batch in enumerate(fed, start.step + 1):
            clock.lap("loader")
            figures = engine.step(batch, weight=weight)
            clock.lap(readings.launches)
            readings.add(Position(epoch, step), figures)
            readings.keep_pace()
            # Several ranks hear of each other's wishes from the figures, to stop together.
            signum = engine.asked() if run.ranks.size == 1 else 0
            if not (signum or readings.due or step == run.steps):
                clock.lap("device")
                continue
            found = readings.read()
            clock.lap("device")
            _count(run, found, sums, clock)
            _show(run, found[-1], sums, progress, steps=len(found))
            signum = max(signum, *(each.figures.signum for each in found))
            clock.lap("host")
            if signum and step < run.steps:
                _leave(run, Position(epoch, step), sums, signum)


def _count(run: Pretraining, found: list[Reading], sums: EpochSums, clock: Clock) -> None:
    for each in found:
        _check_finite(each.figures, each.position)
        sums.add(each.figures.means)
    sums.spend(clock.take())


def _show(
    run: Pretraining, last: Reading, sums: EpochSums, progress: Progress, *, steps: int
) -> None:
    means, speed = last.figures.means, sums.steps * run.recipe.batch_size / sums.seconds
    progress.advance(
        steps * run.recipe.batch_size,
        f"epoch {last.position.epoch}/{run.recipe.epochs}",
        f"instance {means['instance']:.3f}, invariance {means['invariance']:.3f}, "
        f"{speed:.0f} images/s",
    )


def _check_finite(figures: StepFigures, position: Position) -> None:
    """Raise TrainingFailed where a step's loss is no finite number."""
    means = figures.means
    if not math.isfinite(means["loss"]):
        raise TrainingFailed(
            f"the loss is {means['loss']} (instance {means['instance']}, invariance "
            f"{means['invariance']}) in epoch {position.epoch}, step {position.step}; nothing is "
            "published, the last checkpoint stays. Lower optim.lr, raise loss.temperature or use "
            "precision=fp32, in a new run"
        )


def _check_equal(run: Pretraining, epoch: int) -> None:
    """Compare the bank and the weights of all ranks; they must be equal to the last bit.

    Of a divided bank that is the graph, by which all ranks find the same positives.

    Raises:
        TrainingFailed: on every rank, before anything of them is saved.
    """
    state, ranks = run.state, run.ranks
    if ranks.size == 1:
        return
    own = {
        "memory bank": int(digest(replicated(state.bank))),
        "weights": int(digest(list(state.encoder.parameters()))),
    }
    everywhere = ranks.gathered(own)
    for name, value in everywhere[0].items():
        others = [rank for rank, each in enumerate(everywhere) if each[name] != value]
        if others:
            raise TrainingFailed(
                f"after epoch {epoch} the {name} of rank {', '.join(map(str, others))} is not that "
                "of rank 0: its hardware or its libraries compute otherwise, or its memory is "
                "damaged. Nothing is published; take that host out and go on with --resume"
            )


@contextmanager
def _leaving(
    run: Pretraining, position: Position, sums: EpochSums, stop: StopRequest
) -> Iterator[None]:
    """Leave from `position` where any rank is asked to until this is done."""
    with suppress(StopAsked):
        yield
    signum = max(run.ranks.gathered(run.wish(stop)))
    if signum:
        _leave(run, position, sums, signum)


def _give_up_if_asked(run: Pretraining, stop: StopRequest) -> None:
    """Raise StopAsked on all ranks where any wishes to stop; all have to call it."""
    if max(run.ranks.gathered(run.wish(stop))):
        raise StopAsked


def _measure_untrained(run: Pretraining, stop: StopRequest) -> None:
    if run.monitor is None:
        return
    accuracy = run.monitor.measure(
        run.state.encoder, run.device, lambda: _give_up_if_asked(run, stop)
    )
    begun = "untrained" if run.recipe.warm_start is None else "warm-started"
    say(f"{begun} encoder: kNN accuracy {accuracy:.4f}")
    run.journal.write({"epoch": 0, "knn": accuracy})


def _finish_epoch(run: Pretraining, epoch: int, sums: EpochSums, stop: StopRequest) -> None:
    recipe = run.recipe
    last = epoch == recipe.epochs
    means = sums.means()
    collapsed = is_collapsed(
        means["instance"],
        means["spread"],
        num_background=recipe.loss.num_background,
        num_images=len(run.stock),
        dim=recipe.encoder.dim,
    )
    metrics: Metrics = {
        "epoch": epoch,
        "lr": learning_rate(recipe.optim, epoch, recipe.epochs),
        **means,
        "images_per_s": sums.steps * recipe.batch_size / sums.seconds,
        **{f"{part}_share": share for part, share in sums.shares().items()},
        "collapsed": collapsed,
    }
    due = last or epoch % recipe.monitor.every_epochs == 0
    if run.monitor is not None and due:
        metrics["knn"] = run.monitor.measure(
            run.state.encoder, run.device, lambda: _give_up_if_asked(run, stop)
        )
    shown = None
    if run.inspector is not None and (due or collapsed):
        shown = _inspect(run, run.inspector, metrics)
    run.journal.write(metrics, shown)
    say(_epoch_line(metrics, recipe.epochs))
    if collapsed:
        _warn_of_collapse(run)
    if last or epoch % recipe.checkpoint.every_epochs == 0:
        run.begin_save(Position(epoch, run.steps), sums)


def _inspect(run: Pretraining, inspector: Inspector, metrics: Metrics) -> dict[str, Any]:
    """Add what the propagation looks like to `metrics`; return the pictures to show.

    Raises:
        TrainingFailed: the last step made weights that are no numbers.
    """
    epoch, hard = metrics["epoch"], run.recipe.loss.positives == "hard"
    try:
        seen = inspector.inspect(run.state.encoder, run.state.bank, run.device)
    except ValueError as error:
        raise TrainingFailed(
            f"{error} after epoch {epoch}; nothing is published, the last checkpoint stays. Lower "
            "optim.lr, raise loss.temperature or use precision=fp32, in a new run"
        ) from error
    metrics |= seen.figures(inspector.train.labels, hardest_chosen=hard)
    metrics[HISTOGRAMS] = seen.histograms(hardest_chosen=hard)
    return pictures(seen, epoch, inspector.train.ids, inspector.train.labels)


def _epoch_line(metrics: Metrics, epochs: int) -> str:
    knn = f", kNN accuracy {metrics['knn']:.4f}" if "knn" in metrics else ""
    bound = bound_by({part: metrics[f"{part}_share"] for part in PARTS})
    if "purity_chosen" in metrics:
        knn = f", {metrics['purity_chosen']:.0%} of the chosen positives of one class{knn}"
    return (
        f"epoch {metrics['epoch']}/{epochs}: instance loss {metrics['instance']:.4f}, invariance "
        f"loss {metrics['invariance']:.4f}, {metrics['reached']:.1f} positives reached, "
        f"{metrics['images_per_s']:.0f} images/s, {bound}{knn}"
    )


def _warn_of_collapse(run: Pretraining) -> None:
    patience = run.recipe.monitor.collapse_patience
    in_a_row = 0
    for line in reversed(run.journal.lines):
        if not line.get("collapsed"):
            break
        in_a_row += 1
    message = (
        f"COLLAPSE, epoch {run.journal.lines[-1]['epoch']}: the encoder gives all images nearly "
        "the same embedding. Set encoder.normalise=true, or a higher loss.temperature"
    )
    if in_a_row >= patience:
        raise TrainingFailed(
            f"{message}. Stopped after {in_a_row} such epochs in a row (monitor.collapse_patience);"
            " nothing is published"
        )
    say(f"{message}. The run stops after {patience - in_a_row} more such epochs")


def _leave(run: Pretraining, position: Position, sums: EpochSums, signum: int) -> NoReturn:
    run.begin_save(position, sums)
    path = run.finish_save()
    raise Interrupted(signum, f"stopped; the state is in {path}. Go on with --resume")
