"""Stop training again and again at random moments; the end must be that of a run left in peace.

    python tests/faults/stop_runs.py --signal TERM --processes 1 --rounds 50
    python tests/faults/stop_runs.py --signal KILL --processes 2 --rounds 20

Each round forks the processes of `python -m trainer.run --resume` and sends the signal to one of
them, or to all as a launcher does, at a random moment: while images are read, accuracy is measured,
steps are taken, a checkpoint is written or the bundle is made. STOP is followed by KILL, as
torchrun does, once the others have left. When a run comes to its end, its last checkpoint, metrics
and bundle are compared, and the next one is begun. Fails with a traceback; prints what was seen.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.trainer.tiny_run import metrics_of
from trainer import export, session  # noqa: F401   once, before the forks
from trainer.checkpoint import checkpoints, is_whole
from trainer.representation.bundle import open_bundle
from trainer.run import _exit
from trainer.run import main as train

GRACE_S = 30  # what torchrun and Kubernetes leave a process by default
TIMEOUT_S = 5  # distributed.timeout_s
ANY_MOMENT = 0.25  # share of the signals whose moment has nothing to do with the training steps
EPOCHS = 24
RECIPE = (
    f"epochs={EPOCHS}",
    "batch_size=8",
    "device=cpu",
    "data.workers=0",
    "encoder.image_size_px=8",
    "encoder.dim=8",
    "bank.num_neighbours=2",
    "loss.num_background=16",
    "loss.steps=2",
    "loss.num_positives=4",
    "loss.warmup_epochs=1",
    "monitor.every_epochs=4",
    "checkpoint.every_epochs=2",
    f"distributed.timeout_s={TIMEOUT_S}",
)


def prove(folder: Path, signum: int, processes: int, rounds: int, seed: int) -> Counter[str]:
    """Stop runs `rounds` times; returns counts of what was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    images = folder / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 10, 3)).astype(np.uint8)
    np.savez(images, images=pixels, labels=np.arange(40) % 2)
    began = time.monotonic()
    undisturbed = _Run(folder / "whole", images, processes)
    undisturbed.start()
    assert undisturbed.leave(within_s=600) == [0] * processes, undisturbed.said()
    usual_s = time.monotonic() - began
    wanted = _outcome(undisturbed.output)

    run = _Run(folder / "run-0", images, processes)
    while seen["signals"] < rounds:
        whole_before = _newest_whole(run.output)
        run.start()
        if draw.random() < ANY_MOMENT:
            time.sleep(draw.random() * usual_s / 3)
        else:
            run.wait_for_epochs(draw.randrange(1, 6))
            time.sleep(draw.random() * usual_s / EPOCHS)
        whom = draw.choice([[0], [processes - 1], list(range(processes))])
        sent = [run.send(rank, signum) for rank in whom]
        if not any(sent):
            seen["came too late"] += 1
        began = time.monotonic()
        allowed = GRACE_S + (
            0 if signum == signal.SIGTERM and len(whom) == processes else TIMEOUT_S
        )
        others = [rank for rank in range(processes) if rank not in whom]
        if signum == signal.SIGSTOP:
            run.leave(within_s=allowed, ranks=others)
            for rank in whom:
                run.send(rank, signal.SIGKILL)
        codes = run.leave(within_s=allowed)
        longest = max(time.monotonic() - began, seen["longest to leave, ms"] / 1000)
        seen["longest to leave, ms"] = round(longest * 1000)
        seen["signals"] += any(sent)
        seen[_kind(codes, run.said())] += 1
        if signum == signal.SIGTERM and len(whom) == processes and all(sent):
            allowed_codes = {0, 128 + signal.SIGTERM}
            if processes > 1 and "not training" in run.said():
                allowed_codes.add(1)  # one left while another waited for it, within torch
            assert set(codes) <= allowed_codes, (codes, run.said())
        elif any(sent) and signum != signal.SIGTERM:
            assert any(code != 0 for code in codes), (codes, run.said())
        _check(run.output, whole_before)
        if codes == [0] * processes:
            _compare(_outcome(run.output), wanted)
            seen["runs compared"] += 1
            run = _Run(folder / f"run-{seen['runs compared']}", images, processes)
    run.start()
    assert run.leave(within_s=600) == [0] * processes, run.said()
    _compare(_outcome(run.output), wanted)
    seen["runs compared"] += 1
    return seen


class _Run:
    """The processes of one run, started as often as needed."""

    def __init__(self, output: Path, images: Path, processes: int) -> None:
        self.output, self._images, self._size = output, images, processes
        self._log = output.with_suffix(".log")
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}

    def start(self) -> None:
        """Fork all of them."""
        words = ["digits", "--data", str(self._images), "--output", str(self.output), *RECIPE]
        if (self.output / "recipe.yaml").exists():
            words.append("--resume")
        else:  # killed before it had begun: a new run wants an empty folder
            for path in self.output.glob(".*"):
                path.unlink()
        port, self._codes = _free_port(), {}
        self._log.write_text("")
        self._pids = []
        for rank in range(self._size):
            pid = os.fork()
            if pid == 0:
                self._become(rank, port, words)
            self._pids.append(pid)

    def _become(self, rank: int, port: int, words: Sequence[str]) -> None:
        log = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self._size > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._size),
                "LOCAL_WORLD_SIZE": str(self._size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        code = 1
        try:
            code = train(words)
            _exit(code)
        except SystemExit:
            sys.stdout.flush()
        finally:
            os._exit(code)

    def wait_for_epochs(self, count: int) -> None:
        """Wait until it has said that `count` more epochs are done, or has left."""
        while len(self._codes) < self._size and self.said().count("\nepoch ") < count:
            time.sleep(0.01)
            self._collect()

    def send(self, rank: int, signum: int) -> bool:
        """Send a signal; False where that process has left already."""
        self._collect()
        if rank in self._codes:
            return False
        os.kill(self._pids[rank], signum)
        return True

    def leave(self, *, within_s: float, ranks: Sequence[int] | None = None) -> list[int]:
        """Wait for processes to leave; exit codes, negative for a signal."""
        ranks = range(self._size) if ranks is None else ranks
        gives_up = time.monotonic() + within_s
        while self._collect() and any(rank not in self._codes for rank in ranks):
            if time.monotonic() > gives_up:
                for pid in self._pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"still there after {within_s} s: {self.said()}")
            time.sleep(0.01)
        return [self._codes[rank] for rank in ranks]

    def said(self) -> str:
        """All that this start of it said."""
        return self._log.read_text()

    def _collect(self) -> bool:
        for rank, pid in enumerate(self._pids):
            if rank not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return True


def _newest_whole(output: Path) -> str:
    whole = [path.name for path in checkpoints(output / "checkpoints") if is_whole(path)]
    return whole[0] if whole else ""


def _check(output: Path, whole_before: str) -> None:
    """Nothing that stands under its name is torn, and nothing that was saved is lost."""
    for path in checkpoints(output / "checkpoints"):
        assert is_whole(path), f"torn: {path}"
    assert _newest_whole(output) >= whole_before
    if (output / "bundle").exists():
        open_bundle(output / "bundle")
    for name in ("recipe.yaml", "report.json"):
        if (output / name).exists():
            assert (output / name).stat().st_size > 0


def _kind(codes: Sequence[int], said: str) -> str:
    if "Traceback" in said:
        raise AssertionError(said)
    if "the state is in" in said:
        return "stopped with the state saved"
    if "interrupted while not training" in said:
        return "stopped while not training"
    return "ended by themselves" if set(codes) == {0} else "killed or left by the others"


def _outcome(output: Path) -> dict[str, Any]:
    """What a run computed: state, metrics, bundle."""
    newest = checkpoints(output / "checkpoints")[0]
    return {
        "tensors": {
            f"{path.stem}.{name}": tensor
            for path in sorted(newest.glob("*.safetensors"))
            for name, tensor in safetensors.torch.load_file(path).items()
        },
        "metrics": metrics_of(output),
        "weights": open_bundle(output / "bundle").manifest["files"]["encoder.safetensors"],
    }


def _compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name
    assert one["metrics"] == other["metrics"]
    assert one["weights"] == other["weights"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signal", choices=("TERM", "INT", "KILL", "STOP"), default="TERM")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = prove(
            Path(folder),
            signal.Signals[f"SIG{options.signal}"],
            options.processes,
            options.rounds,
            options.seed,
        )
    sys.stdout.write(
        f"SIG{options.signal}, {options.processes} processes, seed {options.seed}: "
        + ", ".join(f"{what}: {count}" for what, count in seen.items())
        + f"; {time.monotonic() - began:.0f} s\n"
    )


if __name__ == "__main__":
    main()
