"""Writing beside the steps: what is written, how many at once, and that no error gets lost.

Run: pytest tests/trainer/test_checkpoint_writer.py
"""

import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer import checkpoint_writer as module
from trainer.checkpoint import Capture, Progress, Retention, TrainingState, checkpoints
from trainer.checkpoint_writer import CheckpointNotWritten, CheckpointWriter
from trainer.config import EncoderConfig
from trainer.encoder import build_encoder
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position


@pytest.fixture
def state() -> TrainingState:
    encoder = build_encoder(
        EncoderConfig(backbone="small", image_size_px=8, head="linear", dim=4, normalise=True)
    )
    return TrainingState(encoder, MemoryBank(6, 4, 2), torch.optim.SGD(encoder.parameters()))


def _progress(step: int) -> Progress:
    return Progress(Position(1, step), {"seed": 1}, "f00d", {"steps": step}, [])


def _writer(directory: Path, keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(directory, Retention(keep, 0, 10))


def _bank(path: Path) -> torch.Tensor:
    return safetensors.torch.load_file(path / "bank.safetensors")["embeddings"]


class Gate:
    """Stands before the disk: lets a write go on when told, and may break it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.breaks = threading.Event(), False
        self.inside = self.most = 0
        real = module.write_checkpoint

        def write(directory: Path, captured: Capture) -> Path:
            self.inside += 1
            self.most = max(self.most, self.inside)
            assert self.open.wait(10)
            self.inside -= 1
            if self.breaks:
                raise OSError(28, "No space left on device")
            return real(directory, captured)

        monkeypatch.setattr(module, "write_checkpoint", write)


def test_save__returns_before_the_disk_and_holds_the_state_of_its_step(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with _writer(tmp_path) as writer:
        state.bank.embeddings.fill_(1.0)
        writer.save(state, _progress(1))
        assert not writer.failed
        assert checkpoints(tmp_path) == []
        state.bank.embeddings.fill_(2.0)  # training goes on
        gate.open.set()
        path = writer.wait()
        assert path is not None
        assert path.name == "epoch-0001-step-000001"
        assert (_bank(path) == 1.0).all()


def test_save__waits_for_the_one_before(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with _writer(tmp_path, keep=9) as writer:
        state.bank.embeddings.fill_(1.0)
        writer.save(state, _progress(1))
        threading.Timer(0.05, gate.open.set).start()
        for step in (2, 3, 4):
            state.bank.embeddings.fill_(float(step))
            writer.save(state, _progress(step))
    assert gate.most == 1
    assert [float(_bank(path)[0, 0]) for path in checkpoints(tmp_path)] == [4, 3, 2, 1]


def test_leaving__waits_until_it_is_whole(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    def run() -> None:
        with _writer(tmp_path) as writer:
            writer.save(state, _progress(1))
            threading.Timer(0.05, gate.open.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch-0001-step-000001"]
    assert len(list(tmp_path.iterdir())) == 1


def test_save__of_the_same_position_is_written_once(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Position] = []
    real = module.write_checkpoint

    def counted(directory: Path, captured: Capture) -> Path:
        written.append(captured.position)
        return real(directory, captured)

    monkeypatch.setattr(module, "write_checkpoint", counted)
    with _writer(tmp_path) as writer:
        for step in (1, 1, 2, 2):
            writer.save(state, _progress(step))
    assert written == [(1, 1), (1, 2)]


def test_wait__where_nothing_was_begun(tmp_path: Path) -> None:
    with _writer(tmp_path / "none") as writer:
        assert writer.wait() is None
        assert not writer.failed
    assert not (tmp_path / "none").exists()


def test_failure__is_told_once_and_names_the_last_good_one(
    tmp_path: Path,
    state: TrainingState,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    told = r"epoch 1, step 2 cannot be written \(No space left.*last good.*step-000001\. Make room"

    def run() -> None:
        with _writer(tmp_path) as writer:
            writer.save(state, _progress(1))
            writer.wait()
            gate.breaks = True
            writer.save(state, _progress(2))
            writer.save(state, _progress(3))  # nothing is begun any more
            assert writer.failed
            gate.breaks = False
            writer.save(state, _progress(2))
            writer.wait()

    with pytest.raises(CheckpointNotWritten, match=told):
        run()
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch-0001-step-000001"]
    assert capsys.readouterr().out == ""


def test_failure__that_nobody_waited_for_is_raised_on_leaving(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    gate.breaks = True
    with (
        pytest.raises(CheckpointNotWritten, match="there is none yet"),
        _writer(tmp_path) as writer,
    ):
        writer.save(state, _progress(1))


def test_failure__besides_another_error_is_said(
    tmp_path: Path,
    state: TrainingState,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    gate.breaks = True

    def run() -> None:
        with _writer(tmp_path) as writer:
            writer.save(state, _progress(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "besides, the checkpoint of epoch 1, step 1 cannot" in capsys.readouterr().out


def test_write__that_cannot_be_read_back_costs_no_older_one(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.write_checkpoint

    def damaged(directory: Path, captured: Capture) -> Path:
        path = real(directory, captured)
        if captured.position.step == 2:
            (path / "bank.safetensors").write_bytes(b"short")
        return path

    monkeypatch.setattr(module, "write_checkpoint", damaged)
    told = r"step 2 cannot be written \(.*bank\.safetensors has 5 bytes.*last good.*step-000001"

    def run() -> None:
        with _writer(tmp_path, keep=1) as writer:
            writer.save(state, _progress(1))
            writer.save(state, _progress(2))
            writer.wait()

    with pytest.raises(CheckpointNotWritten, match=told):
        run()
    assert len(checkpoints(tmp_path)) == 2
