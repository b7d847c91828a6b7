"""All state goes to disk and comes back, damage is seen, old ones go.

Run: pytest tests/trainer/test_checkpoint.py
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.checkpoint import (
    CheckpointError,
    NotFiniteError,
    Progress,
    Retention,
    TrainingState,
    capture,
    checkpoints,
    newest_checkpoint,
    remove_old,
    write_checkpoint,
)
from trainer.config import EncoderConfig
from trainer.encoder import build_encoder
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position
from trainer.snapshot import HostCopies

STEPS = 11  # of an epoch


def _state(seed: int) -> TrainingState:
    torch.manual_seed(seed)
    encoder = build_encoder(
        EncoderConfig(backbone="small", image_size_px=8, head="linear", dim=4, normalise=True)
    )
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bank = MemoryBank(6, 4, 2)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1 * (seed + 1), momentum=0.9)
    for _ in range(2):
        encoder(torch.rand(4, 3, 8, 8)).embedding.sum().backward()
        optimiser.step()
    bank.refresh_neighbours(torch.tensor([1]), torch.tensor([[2, 3]]))
    return TrainingState(encoder, bank, optimiser)


def _progress(epoch: int = 3, step: int = 2) -> Progress:
    return Progress(
        position=Position(epoch, step),
        recipe={"seed": 1, "optim": {"lr": 0.1}},
        data_fingerprint="f00d",
        running={"steps": 2, "sums": {"loss": 0.1 + 0.2}},
        metrics=[{"epoch": 0, "knn": 1 / 3}],
    )


def _save(directory: Path, state: TrainingState, progress: Progress) -> Path:
    return write_checkpoint(directory, capture(state, progress, HostCopies()))


def _damage(path: Path, name: str = "bank.safetensors") -> None:
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 0x80
    (path / name).write_bytes(content)


def _tensors(state: TrainingState) -> list[torch.Tensor]:
    momenta = [values["momentum_buffer"] for values in state.optimiser.state.values()]
    assert len(momenta) > 5
    return [*state.encoder.state_dict().values(), *state.bank.state_dict().values(), *momenta]


def _draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_checkpoint__brings_back_every_tensor_number_and_generator(tmp_path: Path) -> None:
    saved = _state(0)
    random.gauss(0, 1)  # leaves a second draw waiting inside the generator
    np.random.standard_normal()
    path = _save(tmp_path, saved, _progress())
    assert path.name == "epoch-0003-step-000002"
    wanted = [random.gauss(0, 1), float(np.random.standard_normal()), *_draws()]
    fresh = _state(1)
    assert any(not torch.equal(a, b) for a, b in zip(_tensors(saved), _tensors(fresh), strict=True))
    found = newest_checkpoint(tmp_path, warn=pytest.fail)
    assert found is not None
    assert found.progress == _progress()
    found.restore(fresh)
    assert [random.gauss(0, 1), float(np.random.standard_normal()), *_draws()] == wanted
    for a, b in zip(_tensors(saved), _tensors(fresh), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert fresh.optimiser.param_groups[0]["lr"] == 0.1
    convolution = fresh.encoder.backbone[0].weight  # type: ignore[index]
    assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_checkpoint__holds_nothing_that_could_run_code(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(0), _progress())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert not any(b"pickle" in file.read_bytes() for file in path.iterdir())


def test_write__state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, _state(0), _progress(1, 1))
    state = _state(0)
    momentum = next(iter(state.optimiser.state.values()))["momentum_buffer"]
    momentum[-1] = torch.inf
    with pytest.raises(NotFiniteError, match=r"momentum_buffer' of optimiser\.safetensors"):
        _save(tmp_path, state, _progress(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001-step-000001"]


def _names(directory: Path) -> list[tuple[int, int]]:
    assert len(list(directory.iterdir())) == len(checkpoints(directory))  # no leftovers
    parts = [path.name.split("-") for path in checkpoints(directory)]
    return [(int(epoch), int(step)) for _, epoch, _, step in parts]


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, 0, [(10, 11)]),
        (2, 0, [(10, 11), (10, 1)]),
        (9, 0, [(10, 11), (10, 1), (9, 11), (4, 7), (3, 11), (2, 11)]),
        (1, 3, [(10, 11), (9, 11), (3, 11)]),
        (1, 2, [(10, 11), (2, 11)]),  # (4, 7) is no end of an epoch
    ],
)
def test_old__keeps_the_newest_and_those_for_good(
    tmp_path: Path, keep: int, every: int, left: list[tuple[int, int]]
) -> None:
    state = _state(0)
    for position in ((2, 11), (3, 11), (4, 7), (9, 11), (10, 1), (10, 11)):
        _save(tmp_path, state, _progress(*position))
    remove_old(tmp_path, Retention(keep, every, STEPS), set())
    assert _names(tmp_path) == left


def test_old__damaged_ones_do_not_count(tmp_path: Path) -> None:
    state = _state(0)
    for epoch in (1, 2, 3, 4, 5):
        path = _save(tmp_path, state, _progress(epoch, STEPS))
        if epoch in (1, 3, 5):
            _damage(path)
    remove_old(tmp_path, Retention(1, 0, STEPS), set())
    assert _names(tmp_path) == [(5, 11), (4, 11)]
    # Training went on from 4 and wrote 5 anew: it is whole now.
    _save(tmp_path, state, _progress(5, STEPS))
    remove_old(tmp_path, Retention(1, 0, STEPS), set())
    assert _names(tmp_path) == [(5, 11)]


def test_old__compares_each_with_its_hashes_once(tmp_path: Path) -> None:
    whole: set[Path] = set()
    path = _save(tmp_path, _state(0), _progress(1, STEPS))
    remove_old(tmp_path, Retention(1, 0, STEPS), whole)
    assert whole == {path}
    newer = _save(tmp_path, _state(0), _progress(2, STEPS))
    _damage(path)
    _damage(newer)
    remove_old(tmp_path, Retention(1, 0, STEPS), whole)  # the older one was whole when looked at
    assert _names(tmp_path) == [(2, 11), (1, 11)]


def test_newest__none_yet(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing", warn=pytest.fail) is None


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "bank.safetensors", "state.json", "manifest.json"]
)
def test_newest__damaged_is_named_and_the_older_one_taken(tmp_path: Path, name: str) -> None:
    _save(tmp_path, _state(0), _progress(1, 1))
    newer = _save(tmp_path, _state(0), _progress(1, 2))
    _damage(newer, name)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warn=warnings.append)
    assert found is not None
    assert found.progress.position == Position(1, 1)
    assert len(warnings) == 1
    assert str(newer / name) in warnings[0]
    assert "epoch-0001-step-000001" in warnings[0]


def test_newest__none_that_can_be_read(tmp_path: Path) -> None:
    path = _save(tmp_path, _state(0), _progress())
    (path / "bank.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints.*bank\.safetensors"):
        newest_checkpoint(tmp_path, warn=pytest.fail)
