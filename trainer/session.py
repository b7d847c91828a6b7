"""One run from its recipe to its bundle: read this to see what happens in which order.

In: what the command line said. Out: the run folder, filled. Every stage is done elsewhere.
"""

import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.checkpoint import Checkpoint, TrainingState, newest_checkpoint
from trainer.config import Recipe, differing_keys, load_recipe
from trainer.datasets import DIGITS, DataError, ImageSource, open_source, split
from trainer.decoding import CropStock, DecodePool, Survey, survey
from trainer.encoder import build_encoder
from trainer.export import export_bundle
from trainer.memory_bank import MemoryBank
from trainer.monitor import build_knn_monitor
from trainer.pretrain import Pretraining, pretrain
from trainer.progress import Progress, say
from trainer.report import data_facts, training_facts, versions
from trainer.representation.bundle import BundleError, open_bundle
from trainer.representation.preprocess import InputContract
from trainer.run_folder import Journal, OutputError, RunFolder


class UnavailableError(Exception):
    """Something was asked for that this machine or this version does not have."""


class Divided(NamedTuple):
    """The usable images, divided."""

    train: ImageSource
    held_out: ImageSource
    stock: CropStock  # of the training images


def train_and_export(
    folder: RunFolder,
    *,
    recipe: str | None,
    overrides: Sequence[str],
    data: str,
    resume: bool,
    num_processes: int,
) -> None:
    """Do one whole run, or what is left of it.

    Raises:
        RecipeError, DataError, OutputError, CheckpointError, UnavailableError: what was asked for
            cannot be done; nothing that was there is changed.
        TrainingFailed, ExportError: nothing is published.
        Interrupted: a signal asked for a stop, the state is saved.
        OSError: the disk failed.
    """
    if num_processes > 1:
        raise UnavailableError(
            f"started as one of {num_processes} processes, but training with more than one is not "
            "there yet: start it without torchrun"
        )
    resolved = resolve_recipe(folder, recipe, overrides, data=data, resume=resume)
    if resume and is_finished(folder):
        say(f"this run is finished, its bundle is {folder.bundle}")
        return
    device = resolve_device(resolved.device)
    say(f"training on {device} (device={resolved.device}), precision {resolved.precision}")

    with DecodePool(resolved.data.workers) as pool:
        clock = time.monotonic()
        found = survey_images(open_source(data), pool, resolved)
        divided = divide(found, pool, resolved)
        check_enough(len(divided.train), resolved)
        checkpoint = open_checkpoint(folder, found, resolved) if resume else None
        report: dict[str, Any] = {
            "status": "training",
            "source": data,
            "device": str(device),
            "data": data_facts(found, train=divided.train, held_out=divided.held_out),
            "seconds": {"survey": time.monotonic() - clock},
            "versions": versions(),
        }
        folder.write_recipe(resolved)
        folder.write_report(report)

        contract = input_contract(resolved)
        monitor = build_knn_monitor(
            divided.train, divided.held_out, resolved.monitor, contract, pool, seed=resolved.seed
        )
        if monitor is None:
            say("no labels: no image is held out, no kNN accuracy is measured")
        state = build(resolved, len(divided.train), device)
        progress = None
        if checkpoint is not None:
            checkpoint.restore(state)
            progress = checkpoint.progress
            say(f"going on from {checkpoint.directory.name}")
        clock = time.monotonic()
        with Journal(folder, progress.metrics if progress else ()) as journal:
            try:
                pretrain(
                    Pretraining(
                        recipe=resolved,
                        device=device,
                        stock=divided.stock,
                        state=state,
                        monitor=monitor,
                        journal=journal,
                        checkpoints=folder.checkpoints,
                        data_fingerprint=found.source.fingerprint,
                    ),
                    progress,
                )
            finally:
                report["status"] = "stopped"
                report["training"] = training_facts(journal.lines)
                report["seconds"]["training"] = time.monotonic() - clock
                folder.write_report(report)

    clock = time.monotonic()
    say("exporting the bundle")
    export_bundle(
        state.encoder,
        folder.bundle,
        ids=divided.train.ids,
        prepared=lambda indices: divided.train.prepared(indices, contract),
        contract=contract,
        recipe=resolved.as_dict(),
        training=report["training"] | {"data": summary_of(report["data"])},
    )
    report["status"] = "finished"
    report["model_id"] = open_bundle(folder.bundle).model_id
    report["seconds"]["export"] = time.monotonic() - clock
    folder.write_report(report)
    summarise(folder, report)


def resolve_recipe(
    folder: RunFolder, name: str | None, overrides: Sequence[str], *, data: str, resume: bool
) -> Recipe:
    """The recipe of this run; its folder may hold it (`resume`) or must be free for it.

    A resumed run may leave the recipe out. If it is given it must be the one that began the run.
    """
    default = "digits" if data == DIGITS else "folder"
    if not resume:
        recipe = load_recipe(name or default, overrides)
        folder.check_new()
        return recipe
    begun = folder.read_recipe()
    folder.check_writable()
    recipe = load_recipe(name or folder.recipe, overrides)
    differing = differing_keys(begun, recipe)
    if differing:
        raise OutputError(
            f"{folder.root} was begun with another recipe; these keys differ: "
            f"{', '.join(differing)}. Leave them out to go on with it, or give another --output"
        )
    return recipe


def is_finished(folder: RunFolder) -> bool:
    """Whether the run ended and its bundle is whole; a damaged bundle is exported again."""
    report = folder.read_report()
    if report is None or report.get("status") != "finished":
        return False
    try:
        return open_bundle(folder.bundle).model_id == report.get("model_id")
    except BundleError as error:
        say(f"the bundle will be exported again: {error}")
        return False


def resolve_device(asked: str) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` never falls back.

    Raises:
        UnavailableError: `cuda` and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"device=cuda was asked for, but torch {torch.__version__} finds no usable GPU here: "
            "install its driver, or give device=cpu"
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def survey_images(source: ImageSource, pool: DecodePool, recipe: Recipe) -> Survey:
    """Decode everything once, see trainer.decoding, and say what was skipped."""
    with Progress("reading images", len(source)) as progress:
        found = survey(
            source,
            pool,
            recipe.data,
            size_px=recipe.encoder.image_size_px,
            advance=progress.advance,
        )
    say(
        f"{len(found.source)} images"
        + (f", {len(found.skipped)} skipped (report.json lists them)" if found.skipped else "")
        + ("" if found.stored is not None else ", too many to hold: decoded anew for each batch")
    )
    return found


def divide(found: Survey, pool: DecodePool, recipe: Recipe) -> Divided:
    """Hold images out for the monitor, and keep the others' pixels for training."""
    source = found.source
    train, held_out = split(
        source.labels, len(source), holdout=recipe.data.holdout, seed=recipe.seed
    )
    stored = None if found.stored is None else [found.stored[i] for i in train]
    training = source.subset(train)
    stock = CropStock(training, stored, pool, size_px=recipe.encoder.image_size_px)
    return Divided(training, source.subset(held_out), stock)


def check_enough(count: int, recipe: Recipe) -> None:
    """Raise DataError where `count` training images fill no batch or have too few neighbours."""
    neighbours = recipe.bank.num_neighbours
    if count < neighbours + 1:
        raise DataError(
            f"{count} images to train on, but each needs bank.num_neighbours={neighbours} others: "
            f"give at least {neighbours + 1} images, or a smaller bank.num_neighbours"
        )
    if count < recipe.batch_size:
        raise DataError(
            f"{count} images to train on, but a batch takes batch_size={recipe.batch_size}: "
            f"give more images, or batch_size={count} or less"
        )


def open_checkpoint(folder: RunFolder, found: Survey, recipe: Recipe) -> Checkpoint | None:
    """The state to go on from; None where the run was stopped before its first checkpoint."""
    checkpoint = newest_checkpoint(folder.checkpoints, warn=say)
    if checkpoint is None:
        say("no checkpoint yet: beginning anew")
        return None
    if checkpoint.progress.data_fingerprint != found.source.fingerprint:
        raise OutputError(
            f"{folder.root} was begun with other images: the names, sizes or contents under --data "
            "have changed since. Give the same images, or another --output"
        )
    return checkpoint


def build(recipe: Recipe, num_images: int, device: torch.device) -> TrainingState:
    """Encoder, bank and optimiser, as the seed makes them."""
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)  # what numpy's global generator can take
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.encoder)
    bank = MemoryBank(
        num_images, recipe.encoder.dim, recipe.bank.num_neighbours, recipe.bank.momentum
    )
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(
        encoder.parameters(),
        lr=recipe.optim.lr,
        momentum=recipe.optim.momentum,
        weight_decay=recipe.optim.weight_decay,  # of every parameter, as the authors' code
    )
    return TrainingState(encoder, bank.to(device), optimiser)


def input_contract(recipe: Recipe) -> InputContract:
    """How images enter the encoder at evaluation and in the service."""
    return InputContract(
        size_px=recipe.encoder.image_size_px, crop_fraction=recipe.data.crop_fraction
    )


def summary_of(data: dict[str, Any]) -> dict[str, Any]:
    """The part of the data's facts that a bundle carries: counts, no file names."""
    return {name: value for name, value in data.items() if name != "skipped"}


def summarise(folder: RunFolder, report: dict[str, Any]) -> None:
    """Say what was reached and what comes next."""
    facts = report["training"]
    if facts["knn_trained"] is not None:
        say(
            f"kNN accuracy: untrained {facts['knn_untrained']:.4f}, "
            f"trained {facts['knn_trained']:.4f}"
        )
        if facts["knn_trained"] < facts["knn_untrained"]:
            say(
                "WARNING: training made the embeddings worse. Train for more epochs, set "
                "encoder.normalise=true or lower optim.lr"
            )
    if facts["collapsed_epochs"]:
        say(f"WARNING: the run showed collapse in the epochs {facts['collapsed_epochs']}")
    took = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["seconds"].items())
    say(f"bundle {folder.bundle}, model_id {report['model_id'][:16]}...; {took}")
    say(f"next: python -m service.run --bundle {folder.bundle} --state {folder.root / 'service'}")
