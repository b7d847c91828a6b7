"""Going on with a run, with more epochs than it was begun with, and what is refused.

Run: pytest tests/trainer/test_request.py
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.tiny_run import metrics_of
from trainer.checkpoint import checkpoints
from trainer.representation.bundle import open_bundle
from trainer.run import main

from .conftest import TINY

LR = 0.03  # of the recipe `digits`
Extend = Callable[..., int]


def _report(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def _cosine(epoch: int, epochs: int) -> float:
    return LR / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 10, 3)).astype(np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 2)
    return path


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs that came to its end."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(["digits", "--data", str(images), "--output", str(output), *TINY]) == 0
    return output


@pytest.fixture(scope="module")
def extended(finished: Path, resume: Extend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, extended to 4 epochs."""
    output = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(finished, output)
    assert resume(output, "epochs=4") == 0
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def resume(images: Path) -> Extend:
    def again(output: Path, *words: str) -> int:
        return main([*words, "--resume", "--data", str(images), "--output", str(output)])

    return again


def test_epochs__more_of_them_extend_a_finished_run(
    finished: Path, extended: Path, resume: Extend, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = metrics_of(extended)
    assert lines[:3] == metrics_of(finished)  # to the last digit, with the rates of two epochs
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]
    rates = [line["lr"] for line in lines[1:]]
    assert rates == pytest.approx([_cosine(1, 2), _cosine(2, 2), _cosine(3, 4), _cosine(4, 4)])
    when = {"from_epochs": 2, "to_epochs": 4, "after_epoch": 2, "after_step": 3}
    assert _report(extended)["extended"] == [when]
    bundle = open_bundle(extended / "bundle")
    assert bundle.model_id == _report(extended)["model_id"] != _report(finished)["model_id"]
    assert bundle.manifest["recipe"]["epochs"] == bundle.manifest["training"]["epochs"] == 4
    assert bundle.manifest["training"]["extended"] == [when]
    assert "extended" not in open_bundle(finished / "bundle").manifest["training"]
    # It is a run of four epochs from now on.
    assert resume(extended) == resume(extended, "epochs=4") == 0
    assert capsys.readouterr().out.count("this run is finished") == 2
    assert resume(extended, "epochs=3") == 2
    assert "epochs=3 is less than the 4 that" in capsys.readouterr().err
    assert metrics_of(extended) == lines


def test_epochs__an_extended_run_that_was_stopped_goes_on_without_a_word(
    extended: Path, resume: Extend, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(extended, tmp_path / "run"))
    shutil.rmtree(checkpoints(run / "checkpoints")[0])
    (run / "report.json").write_text(json.dumps(_report(run) | {"status": "training"}))
    assert resume(run) == 0
    assert metrics_of(run) == metrics_of(extended)
    assert _report(run)["extended"] == _report(extended)["extended"]
    weights = [
        open_bundle(each / "bundle").manifest["files"]["encoder.safetensors"]
        for each in (run, extended)
    ]
    assert weights[0] == weights[1]


def test_epochs__killed_between_the_recipe_and_the_report_is_no_finished_run(
    run: Path, resume: Extend, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("epochs: 2\n", "epochs: 3\n", 1))
    assert resume(run) == 0
    said = capsys.readouterr().out
    assert "extending from 2 to 3 epochs" in said
    assert "going on from epoch-0002" in said
    assert [line["epoch"] for line in metrics_of(run)] == [0, 1, 2, 3]
    assert _report(run)["extended"][0]["to_epochs"] == 3


def test_epochs__more_of_them_extend_a_stopped_run(run: Path, resume: Extend) -> None:
    before = metrics_of(run)
    shutil.rmtree(checkpoints(run / "checkpoints")[0])
    (run / "report.json").unlink()
    assert resume(run, "epochs=3") == 0
    lines = metrics_of(run)
    assert lines[:2] == before[:2]
    rates = [line["lr"] for line in lines[1:]]
    assert rates == pytest.approx([_cosine(1, 2), _cosine(2, 3), _cosine(3, 3)])
    assert _report(run)["extended"][0]["after_epoch"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["epochs=1"], "epochs=1 is less than the 2 that"),
        # The recipe's own 30 epochs are not asked for by its name.
        (["digits", *(word for word in TINY if word != "epochs=2")], "these keys differ: epochs."),
        (["epochs=4", "loss.warmup_epochs=0"], "these keys differ: loss.warmup_epochs."),
        (["epochs=4", "optim.lr=0.1", "seed=1"], "these keys differ: seed, optim.lr."),
    ],
)
def test_epochs__nothing_else_changes_with_them(
    run: Path, resume: Extend, capsys: pytest.CaptureFixture[str], words: Sequence[str], told: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert resume(run, *words) == 2
    assert told in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_epochs__of_a_finished_run_whose_checkpoints_are_gone(
    run: Path, resume: Extend, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    assert resume(run, "epochs=4") == 2
    told = "is a finished run of 2 epochs without a checkpoint to extend it from"
    assert told in capsys.readouterr().err
    assert len(metrics_of(run)) == 3
    assert open_bundle(run / "bundle").model_id == _report(run)["model_id"]
