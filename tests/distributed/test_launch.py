"""The command under torchrun: one run of two processes, stopped, killed, resumed, refused.

Run: pytest tests/distributed/test_launch.py
"""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from tests.distributed.tiny_ranks import TINY
from tests.trainer.tiny_run import metrics_of
from trainer.checkpoint import checkpoints
from trainer.config import load_recipe
from trainer.representation.bundle import open_bundle
from trainer.run import main

GRACE_S = 30
Start = Callable[..., Any]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    draw = np.random.default_rng(0)
    np.savez(
        path,
        images=draw.integers(0, 256, (40, 10, 10, 3)).astype(np.uint8),
        labels=np.arange(40) % 2,
    )
    return path


def _torchrun(*options: str) -> list[str]:
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return ["-m", "torch.distributed.run", "--nproc-per-node=2", *meeting, *options]


def _words(images: Path, output: Path, *more: str) -> list[str]:
    return ["-m", "trainer.run", "digits", "--data", str(images), "--output", str(output), *more]


def _until(process: Any, words: str) -> str:
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return "".join(said)
    pytest.fail(f"{words!r} was never said: {''.join(said)}")


def _ranks(launcher: Any) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks."""
    found = psutil.Process(launcher.pid).children()
    return sorted(
        (each for each in found if "trainer.run" in each.cmdline()),
        key=lambda each: int(each.environ()["RANK"]),
    )


def _state(output: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(output / "checkpoints")[0]
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted(newest.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


@pytest.mark.timeout(300)
def test_killed_rank__the_job_goes_on_from_its_checkpoint_to_the_same_end(
    images: Path, tmp_path: Path, start: Start
) -> None:
    words = [*TINY, "epochs=12", "checkpoint.every_epochs=2", "bank.sharded=true"]
    whole = start([*_torchrun(), *_words(images, tmp_path / "whole", *words)])
    said, _ = whole.communicate(timeout=140)
    assert whole.returncode == 0, said
    assert said.count("epoch 1/12") == 1  # rank 0 alone speaks
    assert "2 processes" in said
    assert open_bundle(tmp_path / "whole" / "bundle").gallery().ids

    killed = start([*_torchrun("--max-restarts=1"), *_words(images, tmp_path / "cut", *words)])
    _until(killed, "epoch 3/12")
    _ranks(killed)[1].kill()
    said, _ = killed.communicate(timeout=140)
    assert killed.returncode == 0, said
    assert "going on from epoch-" in said
    one, other = _state(tmp_path / "whole"), _state(tmp_path / "cut")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def test_killed_rank__without_restarts_ends_the_job(
    images: Path, tmp_path: Path, start: Start
) -> None:
    process = start([*_torchrun(), *_words(images, tmp_path / "run", *TINY, "epochs=100000")])
    _until(process, "epoch 2/")
    _ranks(process)[0].kill()
    began = time.monotonic()
    process.communicate(timeout=GRACE_S)
    assert process.returncode != 0
    assert time.monotonic() - began < GRACE_S


CONTAINERS_TRAIN = str(Path(__file__).parents[2] / "deploy" / "containers" / "train")


@pytest.fixture
def in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVPROP_TRAIN_PROCESSES", "2")


@pytest.mark.usefixtures("in_two")
def test_containers_train__ends_as_the_trainer_ends(
    images: Path, tmp_path: Path, start: Start
) -> None:
    def train(run: str, epochs: str) -> Any:
        words = _words(images, tmp_path / run, *TINY, f"epochs={epochs}")
        return start([CONTAINERS_TRAIN, *words[2:]])

    wrong, stopped = train("wrong", "none"), train("stopped", "100000")
    said, _ = wrong.communicate(timeout=GRACE_S)
    assert wrong.returncode == 2
    assert "error: recipe digits: epochs='none'" in said
    assert "Traceback" not in said
    _until(stopped, "epoch 2/")
    stopped.terminate()
    said, _ = stopped.communicate(timeout=GRACE_S)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "Go on with --resume" in said
    assert "Traceback" not in said
    done = train("done", "1")
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 0, said


def test_containers_train__wants_a_number_of_processes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVPROP_TRAIN_PROCESSES", "all")
    process = start([CONTAINERS_TRAIN])
    said, _ = process.communicate(timeout=GRACE_S)
    assert process.returncode == 2
    assert "error: INVPROP_TRAIN_PROCESSES=all: wanted a number" in said


@pytest.mark.parametrize("whom", ["launcher", "rank 1"])
def test_signal__stops_all_ranks_at_the_same_step(
    images: Path, tmp_path: Path, start: Start, whom: str
) -> None:
    words = [*TINY, "epochs=100000", "checkpoint.every_epochs=100000"]
    process = start([*_torchrun(), *_words(images, tmp_path / "run", *words)])
    _until(process, "epoch 3/")
    ranks = _ranks(process)
    asked = psutil.Process(process.pid) if whom == "launcher" else ranks[1]
    asked.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=GRACE_S)
    assert process.returncode != 0
    assert "stopped; the state is in" in said
    assert "another process of this run died" not in said
    assert "terminate called" not in said
    assert said.count("Go on with --resume") == 1
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    state = json.loads((saved / "state.json").read_text())
    assert state["running"]["steps"] == state["position"][1]
    assert not (tmp_path / "run" / "bundle").exists()


def _pair(
    start: Start, port: int, first: Sequence[str], second: Sequence[str]
) -> list[tuple[int, str]]:
    """Two ranks started by hand: exit codes and what they said."""
    started = [
        start(words, rank=rank, size=2, port=port) for rank, words in enumerate((first, second))
    ]
    return [(each.wait(60), each.stdout.read()) for each in started]


def test_ranks__that_were_started_differently_are_refused(
    images: Path, tmp_path: Path, start: Start, free_port: Callable[[], int]
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((40, 10, 10, 3), np.uint8), labels=np.arange(40) % 2)
    output = tmp_path / "run"
    for data, more, told in (
        (images, ["optim.lr=0.5"], "optim.lr is 0.03 on rank 0, 0.5 on rank 1. Start all of them"),
        (images, ["bank.sharded=true"], "bank.sharded is false on rank 0, true on rank 1."),
        (other, [], "the fingerprint of the images is"),
    ):
        (first, said), (second, silent) = _pair(
            start, free_port(), _words(images, output, *TINY), _words(data, output, *TINY, *more)
        )
        assert first == 2, said
        assert f"error: the processes differ: {told}" in said
        assert second == 1
        assert "rror" not in silent
        assert not (output / "recipe.yaml").exists()


def test_ranks__extend_and_warm_start_together(
    images: Path, tmp_path: Path, start: Start, free_port: Callable[[], int]
) -> None:
    def words(output: str, *more: str) -> list[str]:
        return _words(images, tmp_path / output, *more)

    assert main([*words("first", *TINY, "epochs=1")[2:]]) == 0
    bundle = open_bundle(tmp_path / "first" / "bundle")
    warm = words("run", *TINY, "epochs=1", "--warm-start", str(bundle.directory))
    for code, said in _pair(start, free_port(), warm, warm):
        assert code == 0, said
    assert load_recipe(tmp_path / "run" / "recipe.yaml").warm_start == bundle.model_id
    began, before = metrics_of(tmp_path / "run")
    assert began["knn"] == metrics_of(tmp_path / "first")[-1]["knn"]

    more, other = (
        [each for each in words("run", "--resume", f"epochs={n}") if each != "digits"]
        for n in (2, 3)
    )
    (code, said), (second, silent) = _pair(start, free_port(), more, other)
    assert (code, second) == (2, 1), (said, silent)
    assert 'the values given is "epochs=2" on rank 0, "epochs=3" on rank 1' in said
    for code, said in _pair(start, free_port(), more, more):
        assert code == 0, said
    assert metrics_of(tmp_path / "run")[:2] == [began, before]
    assert metrics_of(tmp_path / "run")[2]["lr"] == pytest.approx(0.015)  # half way down two epochs
    assert open_bundle(tmp_path / "run" / "bundle").manifest["recipe"]["epochs"] == 2
