"""The disk fails while the writer writes: at every call in turn, short, full.

Run: pytest tests/faults/test_disk.py
"""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trainer.checkpoint import (
    Progress,
    Retention,
    TrainingState,
    checkpoints,
    is_whole,
    newest_checkpoint,
)
from trainer.checkpoint_writer import CheckpointNotWritten, CheckpointWriter
from trainer.config import EncoderConfig
from trainer.encoder import build_encoder
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position

KEEP = 2


@pytest.fixture(scope="module")
def state() -> TrainingState:
    encoder = build_encoder(
        EncoderConfig(backbone="small", image_size_px=8, head="linear", dim=4, normalise=True)
    )
    return TrainingState(encoder, MemoryBank(6, 4, 2), torch.optim.SGD(encoder.parameters()))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, state: TrainingState) -> Path:
    """A folder with the checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("before")
    for step in (1, 2):
        _save(folder, state, step)
    return folder


def _save(folder: Path, state: TrainingState, step: int, keep: int = KEEP) -> None:
    state.bank.embeddings.fill_(float(step))
    with CheckpointWriter(folder, Retention(keep, 0, 100)) as writer:
        writer.save(state, Progress(Position(1, step), {}, "f00d", {"steps": step}, []))
        writer.wait()


def _newest(folder: Path) -> int:
    """The step of the checkpoint that a resumed run would take; it must be of one step."""
    found = newest_checkpoint(folder, warn=pytest.fail)
    assert found is not None
    step = found.progress.position.step
    bank = safetensors.torch.load_file(found.directory / "bank.safetensors")["embeddings"]
    assert (bank == step).all()
    return step


class Faults:
    """Counts the calls of the writer's thread that change the disk, and lets the n-th one fail."""

    def __init__(self, fails_at: int | None, code: int, *, short: bool = False) -> None:
        self.calls: list[str] = []
        self._fails_at, self._code, self._short = fails_at, code, short

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("write", "fsync", "mkdir", "rename"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            there = name == "mkdir" and Path(arguments[0]).exists()  # nothing is changed
            if there or not threading.current_thread().name.startswith("checkpoint"):
                return real(*arguments, **named)
            self.calls.append(name)
            if len(self.calls) - 1 == self._fails_at:
                if self._short and name == "write":
                    descriptor, content = arguments
                    return real(descriptor, content[: len(content) // 2])
                raise OSError(self._code, os.strerror(self._code))
            return real(*arguments, **named)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_error__of_any_call_is_told_and_what_was_saved_stays(
    tmp_path: Path, before: Path, state: TrainingState, code: int
) -> None:
    failed: list[str] = []
    for fails_at in range(1000):  # until no fault fires
        folder = tmp_path / str(fails_at)
        shutil.copytree(before, folder)
        faults = Faults(fails_at, code)
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch)
            done = _finishes(folder, state)
        if len(faults.calls) <= fails_at:
            assert done
            break
        failed.append(faults.calls[fails_at])
        # What fails to be removed once it is out of the way is removed the next time.
        assert not done, (fails_at, faults.calls)
        kept = [int(path.name[-6:]) for path in checkpoints(folder)]
        assert all(is_whole(path) for path in checkpoints(folder)), (fails_at, faults.calls)
        # Two good ones in any case: those from before, or the new one and the one before it.
        assert kept in ([2, 1], [3, 2, 1], [3, 2]), (fails_at, kept)
        assert _newest(folder) == kept[0]
        # The next attempt, on a disk that works again, needs nobody to clear away.
        _save(folder, state, 4)
        assert _newest(folder) == 4
        assert len(list(folder.iterdir())) == KEEP, fails_at
    assert {"write", "fsync", "mkdir", "rename"} <= set(failed)
    assert len(failed) > 15


def _finishes(folder: Path, state: TrainingState) -> bool:
    try:
        _save(folder, state, 3)
    except CheckpointNotWritten as error:
        return "the last good checkpoint is" not in str(error)
    return True


def test_short_writes__are_gone_on_with(
    tmp_path: Path, before: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fails_at in range(1000):
        folder = tmp_path / str(fails_at)
        shutil.copytree(before, folder)
        faults = Faults(fails_at, errno.EIO, short=True)
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch)
            done = _finishes(folder, state)
        if len(faults.calls) <= fails_at:
            break
        assert done == (faults.calls[fails_at] == "write")
        assert _newest(folder) == (3 if done else _newest(folder))
    assert fails_at > 15


FILLS_THE_DISK = """
import sys
import torch
from pathlib import Path
from trainer.checkpoint import Progress, Retention, TrainingState
from trainer.checkpoint_writer import CheckpointNotWritten, CheckpointWriter
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position
import resource

encoder = torch.nn.Linear(8, 8)
small = TrainingState(encoder, MemoryBank(100, 8, 2), torch.optim.SGD(encoder.parameters()))
large = TrainingState(encoder, MemoryBank(100_000, 8, 2), torch.optim.SGD(encoder.parameters()))
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with CheckpointWriter(Path(sys.argv[1]), Retention(2, 0, 100)) as writer:
        for step, state in ((1, small), (2, small), (3, large)):
            writer.save(state, Progress(Position(1, step), {}, "f00d", {}, []))
        writer.wait()
except CheckpointNotWritten as error:
    print(error)
"""


def _fill(folder: Path, limit_bytes: int) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(folder), str(limit_bytes)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return ran.stdout


def test_full__limit_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = _fill(folder, 1_000_000)
    assert f"step 3 cannot be written ({os.strerror(errno.EFBIG)})" in said
    assert "the last good checkpoint is" in said
    assert "epoch-0001-step-000002" in said
    assert sorted(path.name[-1] for path in folder.iterdir()) == ["1", "2"]
    assert all(map(is_whole, checkpoints(folder)))


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_full__file_system(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    said = _fill(folder, 0)
    assert f"step 3 cannot be written ({os.strerror(errno.ENOSPC)})" in said
    assert sorted(path.name[-1] for path in folder.iterdir()) == ["1", "2"]
    assert all(map(is_whole, checkpoints(folder)))
