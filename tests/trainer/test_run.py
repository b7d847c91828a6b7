"""The command itself: a whole run, its folder, what it says, and wrong requests.

Run: pytest tests/trainer/test_run.py
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.tiny_run import metrics_of, published_by, tiny_run
from trainer.representation.bundle import open_bundle
from trainer.run import main
from trainer.run_folder import RunFolder
from trainer.session import summarise

Pictures = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the built-in sample."""
    output = tmp_path_factory.mktemp("finished") / "run"
    small = ["epochs=2", "batch_size=256", "device=cpu", "encoder.image_size_px=8"]
    assert main(["--data", "digits", "--output", str(output), *small]) == 0
    return output


def test_run__fills_its_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "histograms.jsonl",
        "pictures.json",
        "tensorboard",
        "checkpoints",
        "report.json",
        "report.html",
        "bundle",
    }
    report = json.loads((finished / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["device"] == "cpu"
    data = report["data"]
    assert (data["images_found"], data["images_skipped"], data["skipped"]) == (1797, 0, [])
    assert data["images_trained_on"] + data["images_held_out"] == 1797
    assert abs(data["images_held_out"] - 1797 / 4) < 5
    assert set(report["seconds"]) == {"survey", "training", "export"}
    bundle = open_bundle(finished / "bundle")
    assert bundle.model_id == report["model_id"]
    assert bundle.manifest["recipe"]["epochs"] == 2
    assert bundle.manifest["training"]["knn_trained"] == report["training"]["knn_trained"]
    assert len(bundle.gallery().ids) == data["images_trained_on"]
    assert list((finished / "tensorboard").glob("events.*"))


def test_run__ends_with_a_page_for_the_eye(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    trained_on = json.loads((finished / "report.json").read_text())["data"]["images_trained_on"]
    assert f"on {trained_on:,} images of digits" in page
    assert "for 2 of 2 epochs" in page
    assert "Serve it" in page
    shown = json.loads((finished / "pictures.json").read_text())
    assert shown["epoch"] == 2
    assert len(shown["first"]) == 10
    assert page.count("data:image/jpeg") == sum(
        1 + len(each["nearest"]) + len(each["farthest"])
        for each in (*shown["first"], *shown["worst"])
    )
    assert 50_000 < len(page) < 3_000_000


def test_run__measures_before_and_after(finished: Path) -> None:
    lines = metrics_of(finished)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    report = json.loads((finished / "report.json").read_text())
    assert report["training"]["knn_untrained"] == lines[0]["knn"]
    assert report["training"]["knn_trained"] == lines[2]["knn"]


def test_run__that_is_finished_is_not_begun_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "report.json").stat().st_mtime_ns
    assert main(["--resume", "--data", "digits", "--output", str(finished)]) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "report.json").stat().st_mtime_ns == before
    assert main(["--data", "digits", "--output", str(finished)]) == 2
    assert "already holds a run: give --resume" in capsys.readouterr().err


def test_run__whose_bundle_was_damaged_exports_it_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    whole = published_by(output)
    (output / "bundle" / "encoder.onnx").write_bytes(b"damaged")
    assert main(["--resume", "--data", "digits", "--output", str(output)]) == 0
    assert "exported again" in capsys.readouterr().out
    assert published_by(output) == whole
    assert metrics_of(output) == metrics_of(finished)


def test_resume__with_another_recipe_names_the_keys(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--resume", "--data", "digits", "--output", str(finished)]
    assert main([*line, "batch_size=9", "loss.temperature=0.3"]) == 2
    assert "these keys differ: batch_size, loss.temperature" in capsys.readouterr().err


def test_run__on_a_folder_lists_what_it_skipped(
    pictures: Pictures, tmp_path: Path, tiny_overrides: Sequence[str]
) -> None:
    root = pictures(30)
    (root / "dark" / "zero.jpg").write_bytes(b"")
    output = tmp_path / "run"
    assert main(tiny_run(tiny_overrides, root, output, "data.workers=1", "data.holdout=0")) == 0
    data = json.loads((output / "report.json").read_text())["data"]
    assert data["skipped"] == [{"id": "dark/zero.jpg", "reason": "the file is empty (0 bytes)"}]
    assert data["labels"] is True
    bundle = open_bundle(output / "bundle")
    assert bundle.gallery().ids[0] == "dark/000.png"
    assert bundle.manifest["training"]["data"]["images_skipped"] == 1
    assert "skipped" not in bundle.manifest["training"]["data"]  # file names stay at home


def test_run__past_the_memory_limit_is_the_same_run(
    pictures: Pictures, tmp_path: Path, tiny_overrides: Sequence[str]
) -> None:
    root = pictures(30)
    for name, more in (("held", ()), ("streamed", ("data.resident_limit_bytes=1000",))):
        assert main(tiny_run(tiny_overrides, root, tmp_path / name, *more)) == 0
    assert metrics_of(tmp_path / "held") == metrics_of(tmp_path / "streamed")
    report = json.loads((tmp_path / "streamed" / "report.json").read_text())
    assert report["data"]["held_in_memory"] is False


def test_run__without_labels_says_so_once(
    pictures: Pictures,
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    assert main(tiny_run(tiny_overrides, pictures(20, nested=False), output)) == 0
    assert capsys.readouterr().out.count("no labels") == 1
    assert not any("knn" in line for line in metrics_of(output))
    training = open_bundle(output / "bundle").manifest["training"]
    assert training["knn_trained"] is None
    assert training["data"]["images_held_out"] == 0


def test_run__that_made_things_worse_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report: dict[str, Any] = {
        "training": {"knn_untrained": 0.8, "knn_trained": 0.7, "collapsed_epochs": [2]}
    }
    report |= {"model_id": "f00d", "seconds": {"export": 1.0}}
    summarise(RunFolder(tmp_path), report)
    said = capsys.readouterr().out
    assert "untrained 0.8000, trained 0.7000" in said
    assert "made the embeddings worse" in said
    assert f"see {tmp_path / 'report.html'}" in said
    assert "collapse in the epochs [2]" in said
    report["training"]["knn_trained"] = 0.9
    summarise(RunFolder(tmp_path), report)
    assert "worse" not in capsys.readouterr().out


def test_data__that_is_too_little(
    pictures: Pictures,
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    one = shutil.copytree(pictures(1, nested=False), tmp_path / "one")
    few = shutil.copytree(pictures(5, nested=False), tmp_path / "few")
    for data, told in (
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "missing", "does not exist: give a folder of images"),
        (one, "1 images to train on, but each needs bank.num_neighbours=2 others"),
        (few, "5 images to train on, but a batch takes batch_size=8: give more images, or batch"),
    ):
        output = tmp_path / "run"
        assert main(tiny_run(tiny_overrides, data, output)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert told in error
        assert not (output / "recipe.yaml").exists()
        assert list(output.iterdir()) == []


def test_request__that_cannot_be_carried_out(
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    output = str(tmp_path / "run")
    requests = [
        (["imagnet", "--data", "digits", "--output", output], "there is no recipe 'imagnet'"),
        (["--data", "digits", "--output", output, "epoch=1"], "did you mean 'epochs'"),
        (["--data", "digits", "--output", output, "epochs=0"], "at least 1 and at most 100000"),
        (["--data", "digits", "--output", output, "--resume"], "holds no run to resume"),
        (["--data", "digits", "--output", str(tmp_path / "file" / "run")], "cannot be written"),
        (["--data", "digits", "--output", str(tmp_path / "full")], "is not empty"),
    ]
    if not torch.cuda.is_available():
        asked = ["--data", "digits", "--output", output, "device=cuda"]
        requests.append((asked, "device=cuda was asked for"))
    for line, told in requests:
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert told in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--data", "digits", "--output", output]) == 2
    assert "start them with torchrun, or unset WORLD_SIZE" in capsys.readouterr().err


def test_decoding_processes__do_not_import_torch(pictures: Pictures, tmp_path: Path) -> None:
    lines = (
        "import sys, trainer.run, trainer.decoding; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'onnx')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", lines], cwd=root, check=False).returncode == 0
