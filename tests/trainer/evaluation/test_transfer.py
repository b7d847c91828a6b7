"""Transfer: both kinds, which crops, which validation images, what is never looked at.

Run: pytest tests/trainer/evaluation/test_transfer.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.evaluation.context import Evaluation
from trainer.evaluation.labelled import LabelledSplit
from trainer.evaluation.protocol_settings import TransferSettings
from trainer.evaluation.transfer import transfer
from trainer.evaluation.views import random_crops, resized_crops

Make = Callable[..., Evaluation]
BRIEF = TransferSettings(epochs=3, batch_size=18, lr=0.01, head_lr=0.3, untrained=False)


def test_random_crop__is_a_square_of_224_256ths_of_the_short_side() -> None:
    sizes = torch.tensor([[256, 256]] * 400 + [[512, 1024]] * 400)
    views = random_crops(0.5)(sizes, torch.Generator().manual_seed(0))
    left, top, width, height = views.boxes.unbind(1)
    assert torch.equal(width, height)
    assert width[:400].unique().tolist() == [224]
    assert width[400:].unique().tolist() == [448]
    assert (views.boxes >= 0).all()
    assert (left + width <= sizes[:, 1]).all()
    assert (top + height <= sizes[:, 0]).all()
    # Everywhere: 0..32 of 256, and 0..576 of the longer side of 1,024.
    assert (left[:400].min() < 2) & (left[:400].max() > 30)
    assert (left[400:].min() < 20) & (left[400:].max() > 556)
    assert 150 < views.flipped[:400].sum() < 250
    assert not random_crops(0)(sizes, torch.Generator().manual_seed(0)).flipped.any()


def test_resized_crop__has_the_area_that_was_asked_for() -> None:
    sizes = torch.full((500, 2), 100)
    views = resized_crops(0.2, 0)(sizes, torch.Generator().manual_seed(0))
    area = views.boxes[:, 2] * views.boxes[:, 3] / 10_000
    assert 0.2 <= float(area.min()) < 0.25
    assert 0.9 < float(area.max()) <= 1


def test_crops__are_the_authors_for_cars_and_for_the_others(make_evaluation: Make) -> None:
    settings = BRIEF.model_copy(update={"epochs": 1, "linear": True, "validation_share": 0})
    evaluation = make_evaluation()
    assert transfer(evaluation, settings).facts["crops"] == "random_crop"
    cars = dataclasses.replace(
        evaluation, dataset=dataclasses.replace(evaluation.dataset, published_as="cars")
    )
    assert transfer(cars, settings).facts["crops"] == "resized_crop"
    asked = settings.model_copy(update={"crops": "random_crop"})
    assert transfer(cars, asked).facts["crops"] == "random_crop"


@pytest.mark.parametrize("linear", [False, True], ids=["whole network", "linear layer"])
def test_transfer__reports_the_last_epoch_and_the_best_on_validation(
    make_evaluation: Make, linear: bool
) -> None:
    settings = BRIEF.model_copy(update={"linear": linear, "untrained": True, "epochs": 10})
    outcome = transfer(make_evaluation(), settings)
    last, best = outcome.results
    assert (last.name, best.name) == ("last epoch", "best on validation")
    assert outcome.facts["learned_from"] == 54  # 60 without 2 of each of the three classes
    assert outcome.facts["validation_images"] == 6
    assert outcome.facts["validation"] == "drawn from train by the seed"
    assert set(last.metrics) == {"top1", "mean_per_class"}
    assert last.metrics["top1"] > 0.6  # chance is a third
    assert last.untrained is not None
    assert best.untrained is not None
    assert [curve.title for curve in outcome.curves][2] == "Validation accuracy"
    reached = [value for _, value in outcome.curves[2].lines["trained"]]
    assert best.facts["epoch"] == 1 + int(np.argmax(reached))


def test_transfer__without_validation_learns_from_all_and_reports_the_last_epoch(
    make_evaluation: Make,
) -> None:
    outcome = transfer(make_evaluation(), BRIEF.model_copy(update={"validation_share": 0}))
    assert [each.name for each in outcome.results] == ["last epoch"]
    assert outcome.facts["learned_from"] == 60
    assert outcome.facts["validation"] == "none"


def test_transfer__uses_the_sets_own_validation_split(
    make_evaluation: Make, packed_folder: Path, tmp_path: Path
) -> None:
    for name, file in (("train", "train"), ("test", "test"), ("val", "test")):
        (tmp_path / f"{name}.npz").write_bytes((packed_folder / f"{file}.npz").read_bytes())
    outcome = transfer(make_evaluation(root=str(tmp_path)), BRIEF)
    assert outcome.facts["learned_from"] == 60
    assert outcome.facts["validation"] == "the set's own"
    reached = [value for _, value in outcome.curves[2].lines["trained"]]
    assert outcome.results[1].metrics["top1"] == max(reached)  # the same images as the test's


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
    honest, other = transfer(evaluation, BRIEF), transfer(permuted, BRIEF)
    assert honest.curves == other.curves
    assert honest.facts == other.facts
    for one, two in zip(honest.results, other.results, strict=True):
        assert one.facts == two.facts
        assert one.confusion is not None
        assert two.confusion is not None
        assert two.confusion.tolist() == np.roll(one.confusion, 1, axis=0).tolist()
    assert honest.results[0].metrics["top1"] > other.results[0].metrics["top1"]


def test_transfer__of_one_seed_repeats_and_of_another_differs(make_evaluation: Make) -> None:
    one, two = (transfer(make_evaluation(), BRIEF) for _ in range(2))
    assert one.curves == two.curves
    assert transfer(make_evaluation(seed=1), BRIEF).curves != one.curves
