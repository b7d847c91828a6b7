"""One run from its recipe to its bundle: read this to see what happens in which order.

In: what the command line said. Out: the run folder, filled. Every stage is done elsewhere.
"""

import functools
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from trainer.bank_memory import check_bank_fits
from trainer.checkpoint import Checkpoint, TrainingState, newest_checkpoint
from trainer.config import Recipe
from trainer.datasets import DataError, ImageSource, open_source, split
from trainer.decode_pool import MAX_WORKERS, DecodePool
from trainer.decoding import Survey, survey
from trainer.distributed import ALONE, Ranks
from trainer.encoder import build_encoder
from trainer.export import export_bundle
from trainer.inspection import build_inspector
from trainer.interruption import Interrupted
from trainer.memory_bank import MemoryBank
from trainer.monitor import build_knn_monitor
from trainer.nvjpeg import Decode
from trainer.pretrain import Pretraining, TrainingFailed, pretrain
from trainer.progress import Progress, say
from trainer.report import data_facts, extensions, training_facts, versions
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import InputContract
from trainer.request import agree_on_request, resolve_decoder, resolve_device
from trainer.run_folder import Journal, Metrics, OutputError, RunFolder
from trainer.sharded_bank import BankShard, replicated, restore_rows
from trainer.step import loss_config
from trainer.stock import CropStock
from trainer.training_report import write_training_report
from trainer.warm_start import fill_bank, load_weights


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
    warm_start: Path | None,
    ranks: Ranks,
) -> None:
    """Do one whole run, or what is left of it.

    Raises:
        RecipeError, DataError, OutputError, CheckpointError, UnavailableError: what was asked for
            cannot be done; nothing that was there is changed.
        WarmStartError: the weights to begin with do not fit.
        RankError: the processes cannot be one run. FirstRankFailed: rank 0 raised one of these.
        TrainingFailed, ExportError: nothing is published.
        Interrupted: a signal asked for a stop, the state is saved.
        OSError: the disk failed.
    """
    request = agree_on_request(
        folder,
        recipe,
        overrides,
        data=data,
        resume=resume,
        warm_start=warm_start,
        ranks=ranks,
    )
    resolved = request.recipe
    if request.finished:
        say(f"this run is finished, its bundle is {folder.bundle}")
        ranks.close()
        return
    device = resolve_device(resolved.device, ranks)
    on_device = resolve_decoder(resolved.data.decoder, device)
    together = f", {ranks.size} processes" if ranks.size > 1 else ""
    say(
        f"training on {device} (device={resolved.device}), precision {resolved.precision}{together}"
    )

    with DecodePool(decoders(resolved.data.workers, ranks)) as pool:
        clock = time.monotonic()
        found = survey_images(open_source(data), pool, resolved)
        divided = divide(found, pool, resolved, on_device)
        check_enough(len(divided.train), resolved)
        ranks.check_same(
            {"the device": device.type, "the fingerprint of the images": found.source.fingerprint},
            "Every process needs the same images under --data, and the same kind of device",
        )
        check_bank_fits(resolved, len(divided.train), device, ranks)
        ranks = ranks.open_training(device, resolved.distributed.timeout_s)
        checkpoint = ranks.from_first(
            lambda: open_checkpoint(folder, found, resolved, ranks) if request.resume else None
        )
        report: dict[str, Any] = {
            "status": "training",
            "source": data,
            "device": str(device),
            "processes": ranks.size,
            "data": data_facts(found, train=divided.train, held_out=divided.held_out),
            "seconds": {"survey": time.monotonic() - clock},
            "versions": versions(),
        }
        if request.warm_start is not None:
            report["warm_start"] = {
                "model_id": request.warm_start.model_id,
                "bundle": str(request.warm_start.bundle),
            }
        report["extended"] = extensions(
            folder.read_report() if request.resume else None,
            checkpoint.progress if checkpoint else None,
            resolved,
        )
        if ranks.is_first:
            folder.write_recipe(resolved)
            folder.write_report(report)

        contract = input_contract(resolved)
        monitor = build_knn_monitor(
            divided.train,
            divided.held_out,
            resolved.monitor,
            contract,
            pool,
            seed=resolved.seed,
            ranks=ranks,
        )
        if monitor is None:
            say("no labels: no image is held out, no kNN accuracy is measured")
        inspector = build_inspector(
            divided.train,
            resolved.monitor,
            loss_config(resolved),
            contract,
            pool,
            seed=resolved.seed,
            ranks=ranks,
        )
        state = build(resolved, len(divided.train), device, ranks)
        start = request.warm_start if checkpoint is None else None
        if start is not None:
            ranks.from_first(functools.partial(load_weights, start, state.encoder))
            say(f"beginning with the weights of {start.bundle}")
        progress = None
        if checkpoint is not None:
            progress = checkpoint.progress
            say(f"going on from {checkpoint.directory.name}")
        begin_from(checkpoint, state, ranks)
        if start is not None:
            fill_bank(state, divided.train, contract, pool, device=device, ranks=ranks)
        clock = time.monotonic()
        writes_to = folder if ranks.is_first else None
        with Journal(writes_to, progress.metrics if progress else ()) as journal:
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
                        inspector=inspector,
                        ranks=ranks,
                    ),
                    progress,
                )
            except (Interrupted, TrainingFailed) as error:
                report["ended_by"] = str(error)
                raise
            finally:
                report["status"] = "stopped"
                report["training"] = training_facts(journal.lines)
                report["seconds"]["training"] = time.monotonic() - clock
                if ranks.is_first:
                    folder.write_report(report)
                    show(folder, report, resolved, journal.lines, divided.train, pool)
    ranks.close()  # nobody waits for the export
    if not ranks.is_first:
        return

    clock = time.monotonic()
    say("exporting the bundle")
    export_bundle(
        state.encoder,
        folder.bundle,
        ids=divided.train.ids,
        prepared=lambda indices: divided.train.prepared(indices, contract),
        contract=contract,
        recipe=resolved.as_dict(),
        training=report["training"]
        | ({"extended": report["extended"]} if report["extended"] else {})
        | {"data": summary_of(report["data"])},
        config=resolved.export,
        labels=divided.train.labels,
        say=say,
    )
    bundle = open_bundle(folder.bundle)
    report["status"] = "finished"
    report["model_id"] = bundle.model_id
    report["variants"] = dict(bundle.variants)
    report["speed"] = bundle.speed()
    report["seconds"]["export"] = time.monotonic() - clock
    folder.write_report(report)
    with DecodePool(0) as pool:
        show(folder, report, resolved, journal.lines, divided.train, pool)
    summarise(folder, report)


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
    too_many = ", too many to hold: decoded anew for each batch"
    if recipe.data.decoder == "nvjpeg":
        too_many = ", decoded by nvJPEG for each batch"
    say(
        f"{len(found.source)} images"
        + (f", {len(found.skipped)} skipped (report.json lists them)" if found.skipped else "")
        + ("" if found.stored is not None else too_many)
    )
    return found


def divide(
    found: Survey, pool: DecodePool, recipe: Recipe, on_device: Decode | None = None
) -> Divided:
    """Hold images out for the monitor, and keep the others' pixels for training."""
    source = found.source
    train, held_out = split(
        source.labels, len(source), holdout=recipe.data.holdout, seed=recipe.seed
    )
    stored = None if found.stored is None else [found.stored[i] for i in train]
    training = source.subset(train)
    stock = CropStock(
        training,
        stored,
        pool,
        size_px=recipe.encoder.image_size_px,
        sizes=found.sizes[train],
        on_device=on_device,
    )
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


def open_checkpoint(
    folder: RunFolder, found: Survey, recipe: Recipe, ranks: Ranks
) -> Checkpoint | None:
    """The state to go on from; None where the run was stopped before its first checkpoint."""
    checkpoint = newest_checkpoint(folder.checkpoints, warn=say)
    if checkpoint is None:
        report = folder.read_report() or {}
        if report.get("status") == "finished" and report["training"]["epochs"] < recipe.epochs:
            raise OutputError(
                f"{folder.root} is a finished run of {report['training']['epochs']} epochs without "
                "a checkpoint to extend it from: begin a new run with --warm-start "
                f"{folder.bundle} and another --output"
            )
        say("no checkpoint yet: beginning anew")
        return None
    if checkpoint.progress.data_fingerprint != found.source.fingerprint:
        raise OutputError(
            f"{folder.root} was begun with other images: the names, sizes or contents under --data "
            "have changed since. Give the same images, or another --output"
        )
    planned = checkpoint.progress.recipe["epochs"]
    if planned < recipe.epochs:
        say(
            f"extending from {planned} to {recipe.epochs} epochs: the learning rate follows the "
            f"new length from here on, which is not the run that begins with "
            f"epochs={recipe.epochs}"
        )
    before = (folder.read_report() or {}).get("processes", ranks.size)
    if before != ranks.size:
        say(
            f"begun with {before} processes, going on with {ranks.size}: the same batches and "
            "views; the figures agree to rounding where distributed.sync_batchnorm=true"
        )
    return checkpoint


def decoders(asked: int | Literal["auto"], ranks: Ranks) -> int | Literal["auto"]:
    """Decoding processes of this rank; `auto` shares the cores among the ranks of a host."""
    if asked != "auto" or ranks.size == 1:
        return asked
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, cores // ranks.launch.local_size))


def build(
    recipe: Recipe, num_images: int, device: torch.device, ranks: Ranks = ALONE
) -> TrainingState:
    """Encoder, bank (or this rank's part of it) and optimiser, as the seed makes them."""
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)  # what numpy's global generator can take
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.encoder)
    form = (num_images, recipe.encoder.dim, recipe.bank.num_neighbours, recipe.bank.momentum)
    if recipe.bank.sharded and ranks.size > 1:
        share = ranks.share(num_images)
        bank: MemoryBank = BankShard(*form, held=range(share.start, share.stop))
    else:
        bank = MemoryBank(*form)
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(
        encoder.parameters(),
        lr=recipe.optim.lr,
        momentum=recipe.optim.momentum,
        weight_decay=recipe.optim.weight_decay,  # of every parameter, as the authors' code
    )
    return TrainingState(encoder, bank.to(device), optimiser)


def begin_from(checkpoint: Checkpoint | None, state: TrainingState, ranks: Ranks) -> None:
    """Bring all ranks into the state of the checkpoint, or of the seed; rank 0 alone reads."""
    if checkpoint is not None:
        if ranks.is_first:
            checkpoint.restore(state)
        restore_rows(state.bank, checkpoint.bank_rows if ranks.is_first else None, ranks)
    # The seed makes equal ones everywhere; this holds whatever the hosts' libraries do.
    ranks.copy_from_first([*state.encoder.state_dict().values(), *replicated(state.bank)])
    ranks.copy_optimiser_from_first(state.optimiser)


def input_contract(recipe: Recipe) -> InputContract:
    """How images enter the encoder at evaluation and in the service."""
    return InputContract(
        size_px=recipe.encoder.image_size_px, crop_fraction=recipe.data.crop_fraction
    )


def show(
    folder: RunFolder,
    report: dict[str, Any],
    recipe: Recipe,
    metrics: Sequence[Metrics],
    train: ImageSource,
    pool: DecodePool,
) -> None:
    """Write report.html; a run is what it is without, so an error is said and no more."""
    try:
        write_training_report(folder, report, recipe, metrics, train, pool)
    except (DataError, OSError) as error:
        say(f"WARNING: {folder.page} could not be written: {error}")


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
    say(f"see {folder.page}: curves, and anchors with their positives")
    say(f"next: python -m service.run --bundle {folder.bundle} --state {folder.root / 'service'}")
