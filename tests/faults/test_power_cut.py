"""A power cut after any call of the writer: what the disk was not told to keep may be lost.

The calls of one save are recorded (what is written, synchronised, renamed, removed), then every
beginning of that list is played back into a folder without what was not synchronised: contents of
files and names in directories, each kept or lost at random, all lost, or all kept. The loader must
find the old checkpoint or the new one, whole; once the save was acknowledged, the new one.

Run: pytest tests/faults/test_power_cut.py
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trainer.checkpoint import Progress, Retention, TrainingState, newest_checkpoint
from trainer.checkpoint_writer import CheckpointWriter
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position


@dataclass(frozen=True)
class Call:
    """One call that changes the disk."""

    name: str  # mkdir, write, fsync, rename or rmtree
    path: Path
    content: bytes = b""  # of a write
    target: Path = Path()  # of a rename


class Recorder:
    """Lets calls through and remembers them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        for module, name, record in (
            (os, "mkdir", lambda path, *_: Call("mkdir", Path(path))),
            (os, "write", lambda fd, content: Call("write", _path(fd), bytes(content))),
            (os, "fsync", lambda fd: Call("fsync", _path(fd))),
            (os, "rename", lambda old, new: Call("rename", Path(old), target=Path(new))),
            (shutil, "rmtree", lambda path, **_: Call("rmtree", Path(path))),
        ):
            patch.setattr(module, name, self._recorded(getattr(module, name), record))

    def _recorded(
        self, real: Callable[..., Any], record: Callable[..., Call]
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            before = record(*arguments, **named)
            result = real(*arguments, **named)
            self.calls.append(before)
            return result

        return call


def _path(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _save(folder: Path, step: int) -> None:
    encoder = torch.nn.Linear(2, 2)
    state = TrainingState(encoder, MemoryBank(4, 2, 1), torch.optim.SGD(encoder.parameters()))  # type: ignore[arg-type]
    state.bank.embeddings.fill_(float(step))
    with CheckpointWriter(folder, Retention(1, 0, 100)) as writer:
        writer.save(state, Progress(Position(1, step), {}, "f00d", {}, []))
        writer.wait()


def _play(calls: list[Call], root: Path, copy: Path, keeps: Callable[[], bool]) -> None:
    """Do in `copy` what was done in `root`, but for what was not synchronised and is not kept."""

    def there(path: Path) -> Path:
        return copy / path.relative_to(root)

    synchronised = {(call.path, place) for place, call in enumerate(calls) if call.name == "fsync"}

    def is_durable(path: Path, place: int) -> bool:
        return any(done == path and later > place for done, later in synchronised)

    for place, call in enumerate(calls):
        if call.name == "fsync":
            continue
        if call.name == "write":
            target = there(call.path)
            if not target.parent.is_dir():
                continue
            if not (target.exists() or is_durable(call.path.parent, place) or keeps()):
                continue  # its name is lost
            with target.open("ab") as file:
                if is_durable(call.path, place) or keeps():
                    file.write(call.content)
            continue
        # A name in a directory: durable once that directory is synchronised.
        if not (is_durable(call.path.parent, place) or keeps()):
            continue
        if call.name == "mkdir":
            there(call.path).mkdir(exist_ok=True)
        elif call.name == "rename" and there(call.path).is_dir():
            there(call.path).rename(there(call.target))
        elif call.name == "rmtree" and there(call.path).is_dir():
            for file in sorted(there(call.path).iterdir()):
                if keeps():
                    file.unlink()


def _found(folder: Path) -> int | None:
    found = newest_checkpoint(folder, warn=lambda message: None)
    if found is None:
        return None
    bank = safetensors.torch.load_file(found.directory / "bank.safetensors")["embeddings"]
    step = found.progress.position.step
    assert (bank == step).all()
    return step


def test_power_cut__after_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, before = tmp_path / "root", tmp_path / "before"
    _save(root, 1)
    shutil.copytree(root, before)
    with monkeypatch.context() as patch:
        recorder = Recorder(patch)
        _save(root, 2)
    calls = recorder.calls
    assert [call.name for call in calls].count("fsync") >= 8  # six files, two directories
    draw = random.Random(0)
    outcomes: list[tuple[int, int | None]] = []
    for done in range(len(calls) + 1):
        for number in range(8):
            keeps: Callable[[], bool] = lambda: draw.random() < 0.5  # noqa: E731
            if number < 2:
                keeps = (lambda: False, lambda: True)[number]
            copy = tmp_path / "copy"
            shutil.copytree(before, copy)
            _play(calls[:done], root, copy, keeps)
            outcomes.append((done, _found(copy)))
            shutil.rmtree(copy)
    assert {step for _, step in outcomes} == {1, 2}
    assert [step for done, step in outcomes if done == len(calls)] == [2] * 8
