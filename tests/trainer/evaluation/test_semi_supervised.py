"""Semi-supervised fine-tuning: which labels are used, what is reported, what is never looked at.

Run: pytest tests/trainer/evaluation/test_semi_supervised.py
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.datasets import DataError
from trainer.evaluation.context import Evaluation
from trainer.evaluation.labelled import LabelledSplit
from trainer.evaluation.protocol_settings import SemiSupervisedSettings
from trainer.evaluation.semi_supervised import labelled_rows, semi_supervised

Make = Callable[..., Evaluation]
Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]
BRIEF = SemiSupervisedSettings(share=0.2, epochs=4, batch_size=12, lr=0.01, head_lr=0.3)


def test_labelled__are_the_rounded_up_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 25, 100])
    names = ("few", "some", "many")
    rows = labelled_rows(labels, names, share=0.1, seed=0, name="set")
    assert np.bincount(labels[rows]).tolist() == [1, 3, 10]  # 2.5 images are 3
    assert rows.tolist() == sorted(set(rows.tolist()))
    again = labelled_rows(labels, names, share=0.1, seed=0, name="set")
    other = labelled_rows(labels, names, share=0.1, seed=1, name="set")
    assert rows.tolist() == again.tolist() != other.tolist()
    whole = labelled_rows(labels, names, share=1.0, seed=0, name="set")
    assert whole.tolist() == list(range(135))
    seven = labelled_rows(labels, names, share=0.29, seed=0, name="set")
    assert np.bincount(labels[seven]).tolist() == [3, 8, 29]  # 0.29 x 100 is 28.999... in floats


def test_labelled__less_than_one_image_of_a_class_is_an_error() -> None:
    labels = np.repeat([0, 1], [40, 100])
    with pytest.raises(DataError, match=r"0\.01 of the 40 .*'few' .* settings\.share to 0\.025"):
        labelled_rows(labels, ("few", "many"), share=0.01, seed=0, name="set")
    assert len(labelled_rows(labels, ("few", "many"), share=0.025, seed=0, name="set")) == 4


def test_report__lists_the_labelled_images_and_both_encoders(run_job: Run) -> None:
    settings = BRIEF.model_dump(mode="json")
    code, lines, output = run_job(protocol="semi_supervised", settings=settings)
    assert code == 0, lines[-1]
    report = json.loads((output / "report.json").read_text())
    facts = report["facts"]
    assert facts["labelled"] == len(set(facts["labelled_ids"])) == 12
    assert facts["labelled_per_class"] == [4, 4, 4]
    assert facts["milestones"] == [2, 3, 3]
    (result,) = report["results"]  # the set has no validation split
    assert result["name"] == "last epoch"
    assert set(result["metrics"]) == {"top1", "mean_per_class"}  # three classes: no top-5
    assert result["untrained"] is not None
    assert result["gains"]["top1"][0] <= result["gains"]["top1"][1]
    assert np.sum(result["confusion"]) == 30
    assert [curve["title"] for curve in report["curves"]] == ["Training loss", "Training accuracy"]
    assert set(report["curves"][0]["lines"]) == {"trained", "untrained"}
    page = (output / "report.html").read_text()
    assert "Training loss" in page
    losses = [value for _, value in report["curves"][0]["lines"]["trained"]]
    assert losses[-1] < losses[0]
    assert run_job("again", protocol="semi_supervised", settings=settings)[0] == 0
    again = json.loads((output.parent / "again" / "report.json").read_text())
    assert again["results"] == report["results"]
    assert again["curves"] == report["curves"]


def test_validation__of_the_sets_own_chooses_an_epoch(
    make_evaluation: Make, packed_folder: Path, tmp_path: Path
) -> None:
    for name, file in (("train", "train"), ("test", "test"), ("val", "test")):
        (tmp_path / f"{name}.npz").write_bytes((packed_folder / f"{file}.npz").read_bytes())
    settings = BRIEF.model_copy(update={"untrained": False})
    outcome = semi_supervised(make_evaluation(root=str(tmp_path)), settings)
    last, best = outcome.results
    assert (last.name, best.name) == ("last epoch", "best on validation")
    reached = [value for _, value in outcome.curves[2].lines["trained"]]
    assert best.facts["epoch"] == 1 + int(np.argmax(reached))
    # Validation and test hold the same images here: the figures must be equal.
    assert best.metrics["top1"] == max(reached)
    assert last.metrics["top1"] == reached[-1]
    assert last.untrained is None


def test_leak__test_images_and_labels_choose_nothing(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    dataset = evaluation.dataset
    source = dataset.test.source.subset(np.arange(len(dataset.test))[::-1])
    assert source.labels is not None
    wrong = LabelledSplit(dataclasses.replace(source, labels=(source.labels + 1) % 3))
    permuted = dataclasses.replace(
        evaluation,
        dataset=dataclasses.replace(dataset, splits={**dataset.splits, "test": wrong}),
    )
    honest, other = semi_supervised(evaluation, BRIEF), semi_supervised(permuted, BRIEF)
    assert honest.curves == other.curves
    assert honest.facts == other.facts
    assert honest.results[0].confusion is not None
    assert other.results[0].confusion is not None
    moved = np.roll(honest.results[0].confusion, 1, axis=0)
    assert other.results[0].confusion.tolist() == moved.tolist()
    assert moved.tolist() != honest.results[0].confusion.tolist()


def test_bundle__without_weights_or_with_a_damaged_one(
    run_job: Run, bundle_directory: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_directory, bundle)
    (bundle / "encoder.safetensors").unlink()
    code, lines, _ = run_job(protocol="semi_supervised", bundle=str(bundle))
    assert code == 2
    assert lines[-1]["error"]["code"] == "bundle_invalid"
    assert "encoder.safetensors" in lines[-1]["error"]["message"]


def test_broken_images__are_counted_or_end_the_job(
    run_job: Run, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(count=20)
    (root / "a" / "3.png").write_bytes(b"no picture")
    dataset = {"name": "set", "kind": "folder", "root": str(root), "test_share": 0.5}
    settings = {"share": 1.0, "epochs": 1, "untrained": False}
    code, lines, _ = run_job(protocol="semi_supervised", dataset=dataset, settings=settings)
    assert code == 2
    assert lines[-1]["error"]["code"] == "dataset_invalid"
    assert "a/3.png" in lines[-1]["error"]["message"]
    dataset["max_skipped"] = 0.2
    code, lines, output = run_job(protocol="semi_supervised", dataset=dataset, settings=settings)
    assert code == 0, lines[-1]
    report = json.loads((output / "report.json").read_text())
    skipped = [file["id"] for files in report["dataset"]["skipped"].values() for file in files]
    assert skipped == ["a/3.png"]
