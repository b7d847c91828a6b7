"""A run that was cut short, by a signal, a full disk or damage, goes on to the very same end.

Run: pytest tests/trainer/test_run_interrupted.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.trainer.tiny_run import metrics_of, published_by, tiny_run
from trainer.run import main


def _seen(output: Path) -> list[str]:
    """The page without times, and what else was written down for the eye."""
    page = (output / "report.html").read_text()
    page = re.sub(r"<figure><figcaption>Throughput.*?</figure>", "", page, flags=re.DOTALL)
    page = re.sub(r"[\d,.]+ (s|min|h|images/s)\b", "", page)
    return [page, *((output / n).read_text() for n in ("pictures.json", "histograms.jsonl"))]


def test_resume__with_other_data(
    packed: Callable[..., Path],
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    line = tiny_run(tiny_overrides, packed(40), output)
    assert main(line) == 0
    (output / "report.json").unlink()  # as if it had been killed before the end
    packed(41)
    assert main([*line, "--resume"]) == 2
    assert "was begun with other images" in capsys.readouterr().err


def test_resume__goes_back_to_the_older_checkpoint_loudly(
    packed: Callable[..., Path],
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    line = tiny_run(tiny_overrides, packed(40), output)
    assert main(line) == 0
    whole = published_by(output)
    metrics, seen = metrics_of(output), _seen(output)
    (output / "report.json").unlink()
    newest = max((output / "checkpoints").iterdir())
    (newest / "bank.safetensors").write_bytes(b"damaged")
    assert main([*line, "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{newest / 'bank.safetensors'} has 7 bytes" in said
    assert "going on from epoch-0001" in said
    assert metrics_of(output) == metrics
    assert published_by(output) == whole
    assert _seen(output) == seen
    (output / "report.json").unlink()
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "bank.safetensors").write_bytes(b"damaged")
    assert main([*line, "--resume"]) == 2
    assert "none of the checkpoints" in capsys.readouterr().err


def test_resume__before_the_first_checkpoint_begins_anew(
    packed: Callable[..., Path],
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    line = tiny_run(tiny_overrides, packed(40), output)
    assert main(line) == 0
    whole = metrics_of(output)
    (output / "report.json").unlink()
    shutil.rmtree(output / "checkpoints")
    assert main([*line, "--resume"]) == 0
    assert "no checkpoint yet: beginning anew" in capsys.readouterr().out
    assert metrics_of(output) == whole


def _start(arguments: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def _wait_for(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    pytest.fail(f"{words!r} was never said: {''.join(said)}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal__saves_the_state_and_leaves(
    packed: Callable[..., Path], tmp_path: Path, tiny_overrides: Sequence[str], signum: int
) -> None:
    data = packed(40)
    overrides = [*tiny_overrides, "epochs=300", "monitor.every_epochs=300"]
    overrides.append("checkpoint.every_epochs=300")
    output = tmp_path / "run"
    process = _start(tiny_run(overrides, data, output))
    _wait_for(process, "epoch 2/300")
    process.send_signal(signum)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Go on with --resume" in said
    assert "Traceback" not in said
    (stopped,) = (output / "checkpoints").iterdir()
    assert not (output / "bundle").exists()
    page = (output / "report.html").read_text()
    assert "The run is not finished, there is no bundle: stopped; the state is in" in page
    assert "python -m trainer.run --resume" in page
    # 30 of the 40 images train, 8 in a batch: 3 steps make an epoch.
    state = json.loads((stopped / "state.json").read_text())
    epoch, step = state["position"]
    assert epoch < 300
    assert state["running"]["steps"] == step
    assert len(state["metrics"]) == (epoch if step < 3 else epoch + 1)


def test_signal__the_second_kills_at_once(
    packed: Callable[..., Path], tmp_path: Path, tiny_overrides: Sequence[str]
) -> None:
    # One step that is long enough to be interrupted twice: all of 4,000 images in a batch.
    overrides = [*tiny_overrides, "batch_size=3000", "encoder.image_size_px=64", "epochs=300"]
    process = _start(tiny_run(overrides, packed(4000), tmp_path / "run"))
    _wait_for(process, "untrained encoder")
    process.send_signal(signal.SIGINT)
    _wait_for(process, "a second Ctrl-C kills at once")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_disk__full_while_saving_keeps_the_last_good_checkpoint(
    packed: Callable[..., Path], tmp_path: Path, tiny_overrides: Sequence[str]
) -> None:
    output = tmp_path / "run"
    arguments = tiny_run(tiny_overrides, packed(40), output)
    assert main(arguments) == 0
    whole = published_by(output)
    metrics = metrics_of(output)
    (output / "report.json").unlink()
    good, newest = sorted((output / "checkpoints").iterdir())
    shutil.rmtree(newest)
    # No file may grow past 200 kB: the weights have 1.6 MB.
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from trainer.run import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments, "--resume"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "epoch 2, step 3 cannot be written (File too large)" in done.stderr
    assert f"the last good checkpoint is {good}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == [good]
    # With room again it goes on to the very same end.
    assert main([*arguments, "--resume"]) == 0
    assert metrics_of(output) == metrics
    assert published_by(output) == whole
