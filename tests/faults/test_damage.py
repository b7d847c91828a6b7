"""A checkpoint that was damaged on disk is told, never read, and the older one is taken.

Run: pytest tests/faults/test_damage.py     --long: every byte of it, not every 37th
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    TrainingState,
    capture,
    newest_checkpoint,
    write_checkpoint,
)
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position
from trainer.snapshot import HostCopies

FILES = (
    "bank.safetensors",
    "encoder.safetensors",
    "manifest.json",
    "optimiser.safetensors",
    "random.safetensors",
    "state.json",
)


class Tiny(torch.nn.Linear):
    """As few weights as may be: every byte of their file is damaged in turn."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints of the steps 1 and 2."""
    encoder = Tiny(3, 2)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    encoder(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = TrainingState(encoder, MemoryBank(4, 3, 2), optimiser)  # type: ignore[arg-type]
    for step in (1, 2):
        progress = Progress(Position(1, step), {"seed": 1}, "f00d", {"steps": step}, [])
        state.bank.embeddings[0] = step
        write_checkpoint(tmp_path, capture(state, progress, HostCopies()))
        optimiser.step()
    return tmp_path


def _read(folder: Path) -> tuple[Checkpoint, list[str]]:
    warnings: list[str] = []
    found = newest_checkpoint(folder, warn=warnings.append)
    assert found is not None
    return found, warnings


def _assert_told(folder: Path, name: str) -> None:
    found, warnings = _read(folder)
    assert found.progress.position.step == 1
    assert len(warnings) == 1
    assert name in warnings[0]
    assert "Going back to the older epoch-0001-step-000001" in warnings[0]


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.long)])
def test_flipped_bit__anywhere(folder: Path, every: int) -> None:
    newer, draw = folder / "epoch-0001-step-000002", random.Random(0)
    assert sorted(path.name for path in newer.iterdir()) == sorted(FILES)
    flipped = 0
    for name in FILES:
        content = (newer / name).read_bytes()
        for place in range(draw.randrange(every), len(content), every):
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randrange(8)
            (newer / name).write_bytes(damaged)
            flipped += 1
            _assert_told(folder, "epoch-0001-step-000002")
        (newer / name).write_bytes(content)
    assert flipped > 100


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _zero_the_tail(content: bytes, draw: random.Random) -> bytes:
    kept = draw.randrange(len(content) - 8)
    return content[:kept] + bytes(len(content) - kept)


def _lengthen(content: bytes, draw: random.Random) -> bytes:
    return content + bytes(1 + draw.randrange(9))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_cut, _zero_the_tail, _lengthen])
def test_file__of_another_length_or_content(
    folder: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    if name == "random.safetensors" and damage is _zero_the_tail:
        pytest.skip("torch's own state of its generator ends in zeros")
    path, draw = folder / "epoch-0001-step-000002" / name, random.Random(0)
    content = path.read_bytes()
    for _ in range(5):
        path.write_bytes(damage(content, draw))
        _assert_told(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_file__that_is_missing_or_of_another_checkpoint(folder: Path, name: str) -> None:
    path = folder / "epoch-0001-step-000002" / name
    if name != "random.safetensors":  # nothing was drawn between the two
        shutil.copy(folder / "epoch-0001-step-000001" / name, path)
        _assert_told(folder, "epoch-0001-step-000002")
    path.unlink()
    _assert_told(folder, name)


def test_file__that_the_manifest_does_not_name(folder: Path) -> None:
    manifest = folder / "epoch-0001-step-000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("bank.safetensors", "bonk.safetensors"))
    _assert_told(folder, "bonk.safetensors")
    bank = manifest.with_name("bank.safetensors")
    bank.rename(bank.with_name("bonk.safetensors"))
    _assert_told(folder, "bank.safetensors")


def test_all__are_damaged(folder: Path) -> None:
    for path in folder.glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        newest_checkpoint(folder, warn=pytest.fail)
