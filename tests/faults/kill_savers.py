"""SIGKILL processes that save one checkpoint after the other, and read what they leave behind.

    python tests/faults/kill_savers.py --kills 200 --seed 0

Each round forks a saver that goes on from the newest checkpoint of the folder, saves without a
pause, and is killed at a random moment of a save. Fails (exit 1, a traceback) on: a checkpoint
under its name that is not what its hashes say, one that mixes two steps, none after the first was
acknowledged, one older than what was acknowledged, leftovers that stay. Prints what was seen.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.checkpoint import (
    Progress,
    Retention,
    TrainingState,
    checkpoints,
    is_whole,
    newest_checkpoint,
)
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import EncoderConfig
from trainer.encoder import build_encoder
from trainer.memory_bank import MemoryBank
from trainer.schedule import Position

BANK_ROWS = 20_000  # 1.4 MB besides the encoder's 1.6 MB: the disk is at work for most of a save
PIPE_MESSAGE = 8  # bytes: the step whose checkpoint is whole
KEEP = 2


def prove(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` savers; returns counts of what was seen."""
    draw = random.Random(seed)
    seen = dict.fromkeys(("kills", "acknowledged", "unfinished", "not acknowledged but there"), 0)
    newest = 0
    for _ in range(kills):
        acknowledged = _kill_a_saver(folder, newest, draw)
        seen["kills"] += 1
        seen["acknowledged"] += acknowledged - newest
        seen["unfinished"] += any(path.name.startswith(".") for path in folder.iterdir())
        newest = _check(folder, at_least=acknowledged)
        # What was not acknowledged may be there, whole; nothing after it can be.
        assert newest - acknowledged in (0, 1), (newest, acknowledged)
        seen["not acknowledged but there"] += newest - acknowledged
    with _writer(folder) as writer:
        _save(writer, _state(), newest + 1)
    left = sorted(path.name for path in folder.iterdir())
    assert left == [f"epoch-0001-step-{step:06d}" for step in (newest, newest + 1)], left
    return seen


def _kill_a_saver(folder: Path, step: int, draw: random.Random) -> int:
    """Fork, kill at a random moment of a random save; the last step that was acknowledged."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _save_for_ever(folder, step, send)
    os.close(send)
    began, took = time.monotonic(), 0.0
    for _ in range(1 + draw.randrange(3)):  # at least one is acknowledged
        step = int.from_bytes(os.read(receive, PIPE_MESSAGE), "little")
        took, began = time.monotonic() - began, time.monotonic()
    time.sleep(draw.random() * took)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while message := os.read(receive, PIPE_MESSAGE):
        step = int.from_bytes(message, "little")
    os.close(receive)
    return step


def _save_for_ever(folder: Path, step: int, send: int) -> None:
    state = _state()
    writer = _writer(folder)
    while True:
        step += 1
        _save(writer, state, step)
        # The state changes while it is written, as in training.
        state.bank.embeddings.fill_(-1.0)
        writer.wait()
        os.write(send, step.to_bytes(PIPE_MESSAGE, "little"))


def _state() -> TrainingState:
    torch.manual_seed(0)
    encoder = build_encoder(
        EncoderConfig(backbone="small", image_size_px=8, head="linear", dim=16, normalise=True)
    )
    return TrainingState(
        encoder, MemoryBank(BANK_ROWS, 16, 1), torch.optim.SGD(encoder.parameters())
    )


def _writer(folder: Path) -> CheckpointWriter:
    return CheckpointWriter(folder, Retention(KEEP, 0, 10**6))


def _save(writer: CheckpointWriter, state: TrainingState, step: int) -> None:
    state.bank.embeddings.fill_(float(step))
    with torch.no_grad():
        for parameter in state.encoder.parameters():
            parameter.fill_(float(step))
    writer.save(state, Progress(Position(1, step), {}, "f00d", {"steps": step}, []))


def _check(folder: Path, *, at_least: int) -> int:
    """Read everything under its name; the step of the newest."""
    for path in checkpoints(folder):
        assert is_whole(path), f"torn: {path}"
        step = float(path.name.rsplit("-", 1)[1])
        assert json.loads((path / "state.json").read_bytes())["running"]["steps"] == step
        bank = safetensors.torch.load_file(path / "bank.safetensors")["embeddings"]
        assert (bank == step).all(), f"mixed steps: {path}"
        encoder = safetensors.torch.load_file(path / "encoder.safetensors")
        assert (encoder["backbone.0.weight"] == step).all(), f"mixed steps: {path}"

    def fail(message: str) -> None:
        raise AssertionError(message)

    found = newest_checkpoint(folder, warn=fail)
    assert found is not None
    assert found.progress.position.step >= at_least
    return found.progress.position.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One thread, and none before a fork.
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(Path(folder), options.kills, options.seed)
    sys.stdout.write(
        f"seed {options.seed}: " + ", ".join(f"{n} {what}" for what, n in seen.items())
    )
    sys.stdout.write(f"; 0 torn, 0 lost; {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
