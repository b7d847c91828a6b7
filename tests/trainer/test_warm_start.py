"""A run that begins with the weights of a bundle, and of what else it begins fresh.

Run: pytest tests/trainer/test_warm_start.py
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.trainer.tiny_run import metrics_of
from trainer import session, warm_start
from trainer.checkpoint import TrainingState
from trainer.config import EncoderConfig, load_recipe
from trainer.pretrain import Pretraining
from trainer.representation.bundle import WEIGHTS, open_bundle
from trainer.run import main
from trainer.warm_start import WarmStartError, open_warm_start

from .conftest import TINY

Begin = Callable[..., int]


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(open_bundle(output / "bundle").read(WEIGHTS))


def _id(output: Path) -> str:
    return open_bundle(output / "bundle").model_id


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    draw = np.random.default_rng(0)
    pixels = (
        draw.integers(0, 128, (100, 10, 10, 3)) + 100 * (np.arange(100) % 2)[:, None, None, None]
    )
    np.savez(path, images=pixels.astype(np.uint8), labels=np.arange(100) % 2)
    return path


@pytest.fixture(scope="module")
def begin(images: Path) -> Begin:
    def run(output: Path, *words: str) -> int:
        return main([*words, "--data", str(images), "--output", str(output)])

    return run


@pytest.fixture(scope="module")
def first(begin: Begin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run whose bundle others begin with."""
    output = tmp_path_factory.mktemp("first") / "run"
    assert begin(output, "digits", *TINY, "epochs=1") == 0
    return output


@pytest.fixture(scope="module")
def beginning() -> list[TrainingState]:
    """The state of `warm` before its first step."""
    return []


@pytest.fixture(scope="module")
def warm(
    first: Path,
    begin: Begin,
    beginning: list[TrainingState],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run that began with the first one's weights."""
    output, real = tmp_path_factory.mktemp("warm") / "run", session.pretrain

    def watching(run: Pretraining, *arguments: Any) -> None:
        beginning.append(copy.deepcopy(run.state))
        real(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "pretrain", watching)
        patch.setattr(warm_start, "FILLED_TOGETHER", 32)  # 76 images in blocks, the last one short
        line = ["digits", *TINY, "--warm-start", str(first / "bundle")]
        assert begin(output, *line) == 0
    return output


def test_warm_start__takes_the_weights_and_nothing_else(
    first: Path, warm: Path, beginning: list[TrainingState]
) -> None:
    (state,), weights, trained = beginning, _weights(first), _weights(warm)
    start = state.encoder.state_dict()
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], weights[name]) for name in weights)
    assert not torch.equal(trained["backbone.0.weight"], weights["backbone.0.weight"])
    # The bank says what the encoder says of the images as they are; so does the gallery.
    gallery = open_bundle(first / "bundle").gallery().embeddings
    assert gallery.shape == state.bank.embeddings.shape == (76, 8)
    assert np.abs(state.bank.embeddings.numpy() - gallery).max() < 1e-4
    assert state.bank.momentum == 0.5
    assert (state.bank.neighbours == -1).all()
    assert not state.optimiser.state


def test_warm_start__stands_in_recipe_report_and_bundle(first: Path, warm: Path) -> None:
    assert load_recipe(warm / "recipe.yaml").warm_start == _id(first)
    assert open_bundle(warm / "bundle").manifest["recipe"]["warm_start"] == _id(first)
    report = json.loads((warm / "report.json").read_text())
    assert report["warm_start"] == {"model_id": _id(first), "bundle": str(first / "bundle")}
    assert [line["epoch"] for line in metrics_of(warm)] == [0, 1, 2]
    assert metrics_of(warm)[0]["knn"] == metrics_of(first)[-1]["knn"]


def test_warm_start__resuming_needs_no_word_but_may_repeat_it(
    first: Path, warm: Path, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(warm, tmp_path / "run"))
    word = ["--warm-start", str(first / "bundle")]
    for words in ([], word, ["digits", *TINY], ["digits", *TINY, *word]):
        assert begin(run, "--resume", *words) == 0
        assert "this run is finished" in capsys.readouterr().out
    newest = max((run / "checkpoints").iterdir())
    shutil.rmtree(newest)
    (run / "report.json").unlink()
    assert begin(run, "--resume") == 0
    assert "beginning with the weights" not in capsys.readouterr().out
    assert metrics_of(run) == metrics_of(warm)


def test_warm_start__stopped_before_the_first_checkpoint_begins_with_them_again(
    first: Path, warm: Path, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(warm, tmp_path / "run"))
    moved = Path(shutil.copytree(first / "bundle", tmp_path / "moved"))
    report = json.loads((run / "report.json").read_text())
    report["warm_start"]["bundle"] = str(tmp_path / "gone")
    (run / "report.json").write_text(json.dumps(report | {"status": "training"}))
    shutil.rmtree(run / "checkpoints")
    assert begin(run, "--resume") == 2
    error = capsys.readouterr().err
    assert f"begins with the weights of the bundle {_id(first)}: give --warm-start" in error
    assert begin(run, "--resume", "--warm-start", str(moved)) == 0
    assert f"beginning with the weights of {moved}" in capsys.readouterr().out
    assert metrics_of(run) == metrics_of(warm)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["encoder.dim=16", "encoder.head=linear"],
            "encoder.head is mlp in the bundle, linear in the recipe; "
            "encoder.dim is 8 in the bundle, 16 in the recipe",
        ),
        (["encoder.backbone=resnet18"], "encoder.backbone is small in the bundle, resnet18 in"),
        (["encoder.image_size_px=16"], "encoder.image_size_px is 8 in the bundle, 16 in"),
        (["encoder.normalise=false"], "encoder.normalise is True in the bundle, False in"),
        ([f"warm_start={'a' * 64}"], f"asks for the weights of the bundle {'a' * 64}, "),
    ],
)
def test_warm_start__of_another_encoder_or_bundle(
    first: Path,
    begin: Begin,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    line = ["digits", *TINY, *words, "--warm-start", str(first / "bundle")]
    assert begin(tmp_path / "run", *line) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_warm_start__of_no_whole_bundle(
    first: Path, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(first / "bundle", tmp_path / "damaged"))
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    for place, told in (
        (tmp_path / "nothing", "manifest.json is missing"),
        (first, "manifest.json is missing"),  # the run's folder, not its bundle
        (damaged, f"{WEIGHTS} is damaged"),
    ):
        line = ["digits", *TINY, "--warm-start", str(place)]
        assert begin(tmp_path / "run", *line) == 2
        error = capsys.readouterr().err
        assert "error: --warm-start wants the bundle of a finished run" in error
        assert told in error
        assert not (tmp_path / "run").exists()


def test_warm_start__of_weights_that_another_version_named(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, config = warm_start.build_encoder, load_recipe("digits", TINY).encoder
    open_warm_start(first / "bundle", config)

    def otherwise(config: EncoderConfig) -> object:
        return real(config.model_copy(update={"dim": 9}))

    monkeypatch.setattr(warm_start, "build_encoder", otherwise)
    with pytest.raises(WarmStartError, match=r"4 of its weights, first 'head\.2\.bias', are not"):
        open_warm_start(first / "bundle", config)


def test_warm_start__that_the_run_did_not_begin_with(
    first: Path, warm: Path, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, other, began in ((first, warm, "random weights"), (warm, warm, _id(first))):
        assert begin(run, "--resume", "--warm-start", str(other / "bundle")) == 2
        error = capsys.readouterr().err
        assert "was begun with" in error
        assert began in error
        assert f"is the bundle {_id(other)}: leave out --warm-start" in error
    assert begin(warm, "--resume", "warm_start=null") == 2
    assert "these keys differ: warm_start" in capsys.readouterr().err
    recipe = str(warm / "recipe.yaml")  # a copied recipe keeps what it began with
    assert begin(tmp_path / "run", recipe) == 2
    assert f"asks for the weights of the bundle {_id(first)}: give" in capsys.readouterr().err
