"""All state of a training run on disk, so that it can go on as if it had never stopped.

In: encoder, bank, optimiser, random generators, position, metrics. Out: a directory
`epoch-0003-step-000123` of safetensors and JSON, nothing that can run code, written whole or not at
all; the newest few are kept, the newest that is undamaged is what a resumed run reads.
trainer/checkpoint_writer.py does this beside the training steps.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trainer.encoder import Encoder
from trainer.memory_bank import MemoryBank
from trainer.representation.artifact import (
    MANIFEST,
    ArtifactError,
    Content,
    open_artifact,
    remove_artifact,
    remove_unfinished,
    write_artifact,
)
from trainer.schedule import Position
from trainer.sharded_bank import BankShard
from trainer.snapshot import HostCopies, Snapshot, not_finite, safetensors_pieces

SCHEMA = "invprop.checkpoint/1"
ENCODER, BANK, OPTIMISER, RANDOM = (
    f"{part}.safetensors" for part in ("encoder", "bank", "optimiser", "random")
)
STATE = "state.json"
_NAME = re.compile(r"epoch-(\d+)-step-(\d+)")


class CheckpointError(Exception):
    """Checkpoints that cannot be read; the message names the files."""


class NotFiniteError(Exception):
    """A state that must not be kept, as nothing could go on from it; the message says where."""


@dataclass(frozen=True)
class TrainingState:
    """The live objects of a run: saving reads them, restoring writes into them."""

    encoder: Encoder
    bank: MemoryBank
    optimiser: torch.optim.Optimizer


@dataclass(frozen=True)
class Progress:
    """What else a run has to know to go on."""

    position: Position
    recipe: Mapping[str, Any]  # resolved
    data_fingerprint: str
    running: Mapping[str, Any]  # sums over the epoch that is under way, as JSON values
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl so far


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was compared with its hashes."""

    directory: Path
    progress: Progress

    def restore(self, state: TrainingState) -> None:
        """Write encoder, bank, optimiser and the global random generators back.

        Of a divided bank only the graph: its rows go to their ranks, see `bank_rows`.
        """
        read = {
            name: safetensors.torch.load((self.directory / name).read_bytes())
            for name in (ENCODER, OPTIMISER, RANDOM)
        }
        content = json.loads((self.directory / STATE).read_bytes())
        state.encoder.load_state_dict(read[ENCODER])
        with self._open_bank() as file:
            bank = {"neighbours": file.get_tensor("neighbours")}
            if isinstance(state.bank, BankShard):
                bank["embeddings"] = state.bank.embeddings
            else:
                bank["embeddings"] = file.get_tensor("embeddings")
            state.bank.load_state_dict(bank)
        state.optimiser.load_state_dict(_unflatten(content["optimiser"], read[OPTIMISER]))
        _restore_random(content["random"], read[RANDOM])

    def bank_rows(self, rows: slice) -> Tensor:
        """Some of the (N, D) rows of the whole bank, read from the file without the others."""
        with self._open_bank() as file:
            found: Tensor = file.get_slice("embeddings")[rows.start : rows.stop]
            return found

    def _open_bank(self) -> Any:
        return safetensors.safe_open(self.directory / BANK, framework="pt")


class Retention(NamedTuple):
    """Which checkpoints stay when a new one is in its place."""

    keep: int  # the newest so many that are whole
    keep_every_epochs: int  # the ends of every so many epochs, for good; 0: none
    steps_per_epoch: int

    def is_for_good(self, position: Position) -> bool:
        """Whether a checkpoint of `position` is never removed."""
        every = self.keep_every_epochs
        return every > 0 and position.step == self.steps_per_epoch and position.epoch % every == 0


@dataclass(frozen=True)
class Capture:
    """Everything that goes into a checkpoint, as it was at one step."""

    position: Position
    values: Mapping[str, Any]  # of state.json
    tensors: Snapshot


def capture(
    state: TrainingState,
    progress: Progress,
    copies: HostCopies,
    *,
    bank: Mapping[str, Tensor] | None = None,
) -> Capture:
    """Copy all that a checkpoint holds, so that training may change it from now on.

    Args:
        copies: buffers that no other capture uses any more.
        bank: the whole bank where `state` holds a part of it, see `whole_state`.
    """
    tensors: dict[str, Tensor] = {}
    optimiser = _flatten(state.optimiser.state_dict(), "", tensors)
    random_values, random_tensors = _random_state()
    values = {
        "schema": SCHEMA,
        "position": list(progress.position),
        "recipe": dict(progress.recipe),
        "data_fingerprint": progress.data_fingerprint,
        "running": dict(progress.running),
        "metrics": list(progress.metrics),
        "optimiser": optimiser,
        "random": random_values,
    }
    files = {
        ENCODER: state.encoder.state_dict(),
        BANK: state.bank.state_dict() if bank is None else bank,
        OPTIMISER: tensors,
        RANDOM: random_tensors,
    }
    return Capture(progress.position, values, copies.take(files))


def write_checkpoint(directory: Path, captured: Capture) -> Path:
    """Write what was captured as a checkpoint below `directory`, all or nothing.

    Raises:
        OSError: the disk is full or not writable; what was there stays.
        NotFiniteError: a tensor holds an infinite value or no number; nothing is written.
    """
    captured.tensors.wait()
    for name, tensors in captured.tensors.files.items():
        wrong = not_finite(tensors)
        if wrong is not None:
            raise NotFiniteError(f"{wrong!r} of {name} holds values that are no numbers")
    files: dict[str, Content] = {
        name: safetensors_pieces(tensors) for name, tensors in captured.tensors.files.items()
    }
    files[STATE] = json.dumps(captured.values).encode()
    path = checkpoint_path(directory, captured.position)
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory)
    write_artifact(path, files, {"schema": SCHEMA})
    return path


def checkpoint_path(directory: Path, position: Position) -> Path:
    """Where the checkpoint of a position stands."""
    return directory / f"epoch-{position.epoch:04d}-step-{position.step:06d}"


def remove_old(directory: Path, retention: Retention, whole: set[Path]) -> None:
    """Remove what is older than the newest `retention.keep` that are whole, and not for good.

    A damaged one does not count among them, so that it never drives out one that can be read.

    Args:
        whole: those that were compared with their hashes before; new ones are added.

    Raises:
        OSError: one cannot be moved away.
    """
    kept = 0
    for path in checkpoints(directory):
        if kept < retention.keep:
            if path in whole or is_whole(path):
                whole.add(path)
                kept += 1
        elif not retention.is_for_good(_position(path)):
            whole.discard(path)
            remove_artifact(path)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what its manifest says."""
    try:
        open_artifact(path)
    except ArtifactError:
        return False
    return True


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints below `directory`, newest first, undamaged or not."""
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=_position, reverse=True)


def newest_checkpoint(directory: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    """Open the newest undamaged checkpoint; None where there is none at all.

    Args:
        warn: told of each damaged checkpoint that was passed over.

    Raises:
        CheckpointError: there are some and none can be read.
    """
    problems = []
    for path in checkpoints(directory):
        try:
            checkpoint = _open(path)
        except ArtifactError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"damaged checkpoint: {problem}. Going back to the older {path.name}")
        return checkpoint
    if problems:
        raise CheckpointError(
            f"none of the checkpoints in {directory} can be read: {'; '.join(problems)}. "
            "Restore one of them from a copy, or start anew in another folder"
        )
    return None


def _open(path: Path) -> Checkpoint:
    manifest = open_artifact(path)
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {manifest.get('schema')!r}, wanted {SCHEMA!r}")
    for name in (ENCODER, BANK, OPTIMISER, RANDOM, STATE):
        if name not in manifest["files"]:
            raise ArtifactError(f"{path / MANIFEST} does not list {name}")
    content = json.loads((path / STATE).read_bytes())
    epoch, step = content["position"]
    return Checkpoint(
        path,
        Progress(
            position=Position(epoch, step),
            recipe=content["recipe"],
            data_fingerprint=content["data_fingerprint"],
            running=content["running"],
            metrics=content["metrics"],
        ),
    )


def _position(path: Path) -> Position:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # only such are listed
    return Position(int(match[1]), int(match[2]))


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor in nested dicts and lists by {"tensor": name}, collected in `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}  # pairs: JSON would turn the whole numbers among the keys to text
    if isinstance(value, list | tuple):
        return [_flatten(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unflatten(item, tensors) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def _random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The global generators of Python, numpy and torch as JSON values and tensors."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # its declared type covers two forms
    kind, keys, position, has_gauss, cached = numpy_state
    tensors = {"torch": torch.get_rng_state()}
    for index, cuda_state in enumerate(torch.cuda.get_rng_state_all()):
        tensors[f"cuda.{index}"] = cuda_state
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    return values, tensors


def _restore_random(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    saved = [name for name in tensors if name.startswith("cuda.")]
    if len(saved) == torch.cuda.device_count():  # another machine: nothing is drawn there anyway
        for name in saved:
            torch.cuda.set_rng_state(tensors[name], int(name.removeprefix("cuda.")))
