"""Fine-tuning: rates and steps by hand, what stays frozen, what is copied, what is chosen.

Run: pytest tests/trainer/evaluation/test_fine_tuning.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.evaluation.context import Evaluation, state_digest
from trainer.evaluation.fine_tuning import Classifier, HeldImages, Rates, fine_tune, rates_of
from trainer.evaluation.outcome import EvaluationError
from trainer.evaluation.protocol_settings import SemiSupervisedSettings, TransferSettings
from trainer.evaluation.views import TrainingViews

Make = Callable[..., Evaluation]
BRIEF = TransferSettings(epochs=2, batch_size=16, lr=0.01, head_lr=0.1)


def test_rates__of_the_authors_semi_supervised_schedule_and_of_their_mistakes() -> None:
    settings = SemiSupervisedSettings()
    right = rates_of(settings, (15, 20, 25), None)
    theirs = rates_of(settings, (15, 20, 25), "semi_supervised")
    for number, fall, late in (
        (0, 1, 1),
        (14, 1, 1),
        (15, 0.1, 1),
        (16, 0.1, 0.1),
        (29, 1e-3, 1e-3),
    ):
        assert right(number) == pytest.approx(Rates(0.0012 * fall, 0.06 * fall))
        assert theirs(number) == pytest.approx(Rates(0.0012 * late, 0.06))


def test_rates__of_the_authors_transfer_schedule_and_of_their_mistake() -> None:
    right = rates_of(TransferSettings(), (50, 70, 80), None)
    theirs = rates_of(TransferSettings(), (50, 70, 80), "fine_tune")
    assert right(0) == theirs(0) == pytest.approx(Rates(0.001, 0.05))
    assert right(1) == pytest.approx(Rates(0.001, 0.05))
    assert theirs(1) == pytest.approx(Rates(0.001, 0.005))
    assert right(70) == pytest.approx(Rates(1e-5, 5e-4))
    assert theirs(80) == pytest.approx(Rates(1e-6, 5e-6))


def test_step__of_the_head_by_hand(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    network = Classifier(evaluation.fresh_copy(), 3, seed=0, frozen=True)
    torch.nn.init.zeros_(network.head.weight)
    views = TrainingViews(evaluation, "train")
    labels = evaluation.dataset.train.labels
    (batch,) = views.epoch(60, seed=0, epoch=0)
    network.eval()
    features = network.backbone((batch.pixels - network.pixel_mean) / network.pixel_std)
    # Equal logits: softmax 1/3 of each class. Gradient: mean of (1/3 - onehot) x features.
    onehot = torch.nn.functional.one_hot(torch.from_numpy(labels[batch.places]), 3)
    wanted = -0.5 * (1 / 3 - onehot.float()).T @ features / 60
    settings = TransferSettings(epochs=1, batch_size=60, momentum=0, weight_decay=0)
    course = fine_tune(
        evaluation, network, views, labels, settings, lambda n: Rates(0, 0.5), held=None, said="x"
    )
    assert torch.allclose(network.head.weight, wanted.detach(), atol=1e-6)
    assert course.losses == [(1, pytest.approx(np.log(3)))]


@pytest.mark.parametrize("frozen", [True, False])
def test_backbone__is_frozen_with_its_statistics_or_all_of_it_learns(
    make_evaluation: Make, frozen: bool
) -> None:
    evaluation = make_evaluation()
    encoder = evaluation.fresh_copy()
    before = state_digest(evaluation.trained.encoder)
    network = Classifier(encoder, 3, seed=0, frozen=frozen)
    original = evaluation.trained.encoder.backbone.state_dict()
    views = TrainingViews(evaluation, "train")
    rates = rates_of(BRIEF, (), None)
    labels = evaluation.dataset.train.labels
    fine_tune(evaluation, network, views, labels, BRIEF, rates, held=None, said="x")
    moved = [
        name
        for name, tensor in network.backbone.state_dict().items()
        if not torch.equal(tensor, original[name])
    ]
    assert moved == ([] if frozen else list(original))
    assert state_digest(evaluation.trained.encoder) == before


def test_best__is_the_first_epoch_of_the_highest_validation_accuracy(
    make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = make_evaluation()
    network = Classifier(evaluation.fresh_copy(), 3, seed=0, frozen=True)
    heads = []

    def accuracy(self: HeldImages, network: Classifier) -> float:
        heads.append(network.head.weight.detach().clone())
        return (0.2, 0.7, 0.7, 0.5)[len(heads) - 1]

    monkeypatch.setattr(HeldImages, "accuracy", accuracy)
    settings = TransferSettings(epochs=4, batch_size=30)
    held = HeldImages(evaluation, "train", np.arange(6))
    views = TrainingViews(evaluation, "train", np.arange(6, 60))
    course = fine_tune(
        evaluation,
        network,
        views,
        evaluation.dataset.train.labels[6:],
        settings,
        rates_of(settings, (), None),
        held=held,
        said="x",
    )
    assert course.best_epoch == 2
    assert course.best is not None
    assert torch.equal(course.best.head.weight, heads[1])
    assert not torch.equal(network.head.weight, heads[1])


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["held in memory", "prepared anew"])
def test_held_images__are_scored_as_the_test_is(
    make_evaluation: Make, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("trainer.evaluation.fine_tuning.RESIDENT_LIMIT_BYTES", limit)
    evaluation = make_evaluation()
    network = Classifier(evaluation.fresh_copy(), 3, seed=0, frozen=True)
    held = HeldImages(evaluation, "train", np.array([3, 4, 5, 7]))
    assert held.labels.tolist() == [0, 1, 2, 1]
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert held.accuracy(network) == held.accuracy(network) == 0.5  # two of four are of class 1


def test_loss__that_is_not_finite_says_what_to_lower(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    network = Classifier(evaluation.fresh_copy(), 3, seed=0, frozen=False)
    torch.nn.init.constant_(network.head.bias, float("nan"))
    views = TrainingViews(evaluation, "train")
    with pytest.raises(EvaluationError, match=r"lower settings\.lr and settings\.head_lr"):
        fine_tune(
            evaluation,
            network,
            views,
            evaluation.dataset.train.labels,
            BRIEF,
            rates_of(BRIEF, (), None),
            held=None,
            said="fine-tuning",
        )


def test_skipped__of_a_split_that_is_read_in_two_parts_are_all_kept(
    make_evaluation: Make, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(count=10)
    for name in ("a/0.png", "b/9.png"):
        (root / name).write_bytes(b"no picture")
    evaluation = make_evaluation(kind="folder", root=str(root), test_share=0.1, max_skipped=0.5)
    source = evaluation.dataset.train.source
    first = [seat for seat, name in enumerate(source.ids) if name.startswith("a")]
    rest = [seat for seat, name in enumerate(source.ids) if name.startswith("b")]
    held = HeldImages(evaluation, "train", np.array(first))
    views = TrainingViews(evaluation, "train", np.array(rest))
    broken = {"a/0.png", "b/9.png"} & set(source.ids)
    assert broken
    assert {file.id for file in evaluation.skipped["train"]} == broken
    assert len(held.labels) + len(views.rows) == len(source) - len(broken)


def test_untrained_twin__of_the_same_seed_is_the_same(make_evaluation: Make) -> None:
    one, two = (make_evaluation(seed=4).untrained() for _ in range(2))
    other = dataclasses.replace(make_evaluation(seed=4), seed=5).untrained()
    assert state_digest(one.encoder) == state_digest(two.encoder) != state_digest(other.encoder)
