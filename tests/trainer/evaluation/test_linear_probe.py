"""Linear probes: equal to scikit-learn, by hand on placed points, and deaf to the test items.

Run: pytest tests/trainer/evaluation/test_linear_probe.py
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from trainer.config import EncoderConfig
from trainer.datasets import split as divide
from trainer.encoder import build_encoder
from trainer.evaluation.context import Evaluation
from trainer.evaluation.features import extract
from trainer.evaluation.job import JobError
from trainer.evaluation.labelled import LabelledSplit
from trainer.evaluation.layers import encode_with, expanded
from trainer.evaluation.linear_probe import linear_probe
from trainer.evaluation.logistic import choose_c, fit_logistic, standardised_by
from trainer.evaluation.outcome import EvaluationError, Outcome
from trainer.evaluation.protocol_settings import LinearProbeSettings
from trainer.evaluation.sgd_heads import HeadBatch, Heads, train_heads

Make = Callable[..., Evaluation]
LBFGS = LinearProbeSettings(classifier="lbfgs", c=(0.001, 0.1))
SGD = LinearProbeSettings(epochs=6, batch_size=16, lr=0.5)


def test_logistic__equals_scikit_learn_called_directly() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(2, 3, (90, 5)).astype(np.float32)
    labels = np.arange(90) % 3
    rows[:, 0] += labels
    ours = fit_logistic(rows, labels, c=0.3, max_iter=200, seed=0)
    theirs = LogisticRegression(C=0.3, max_iter=200, random_state=0)
    scaled = StandardScaler().fit_transform(rows.astype(np.float64)).astype(np.float32)
    theirs.fit(scaled, labels)
    assert np.abs(ours.model.coef_ - theirs.coef_).max() < 1e-4
    assert np.abs(ours.scores(rows) - theirs.decision_function(scaled)).max() < 1e-3


def test_lbfgs__whole_protocol_equals_scikit_learn_called_directly(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    outcome = linear_probe(evaluation, LBFGS)
    train = extract(evaluation, evaluation.trained, "train", ["features"]).values["features"]
    test = extract(evaluation, evaluation.trained, "test", ["features"]).values["features"]
    labels, wanted = evaluation.dataset.train.labels, evaluation.dataset.test.labels
    fit, held = divide(labels, 60, holdout=0.2, seed=0)
    accuracies = {}
    for c in (0.001, 0.1):
        scaler = StandardScaler().fit(train[fit])
        model = LogisticRegression(C=c, max_iter=100).fit(scaler.transform(train[fit]), labels[fit])
        accuracies[c] = model.score(scaler.transform(train[held]), labels[held])
    best = max(accuracies, key=lambda c: (accuracies[c], -c))
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=best, max_iter=100).fit(scaler.transform(train), labels)
    (result,) = outcome.results
    assert result.facts["c"] == best
    assert result.facts["validation_top1"] == {f"{c:g}": a for c, a in accuracies.items()}
    assert result.metrics["top1"] == model.score(scaler.transform(test), wanted)


def test_standardisation__of_a_column_that_never_varies_is_zero() -> None:
    rows = np.array([[1.0, 0.1], [3.0, 0.1]], np.float32)
    assert standardised_by(rows)(rows).tolist() == [[-1, 0], [1, 0]]


def test_choice__takes_the_smallest_of_equal_cs() -> None:
    rows = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32)
    labels = np.array([0, 0, 1, 1])
    choice = choose_c(rows, labels, rows, labels, cs=(10.0, 0.1, 1.0), max_iter=50, seed=0)
    assert choice.c == 0.1
    assert choice.accuracies == {"0.1": 1.0, "1": 1.0, "10": 1.0}


def _permuted_test(evaluation: Evaluation) -> Evaluation:
    """The same training images; test images in another order with wrong labels."""
    dataset = evaluation.dataset
    source = dataset.test.source.subset(np.arange(len(dataset.test))[::-1])
    assert source.labels is not None
    source = dataclasses.replace(source, labels=(source.labels + 1) % 3)
    splits = {**dataset.splits, "test": LabelledSplit(source)}
    return dataclasses.replace(evaluation, dataset=dataclasses.replace(dataset, splits=splits))


@pytest.mark.parametrize("settings", [LBFGS, SGD], ids=["lbfgs", "sgd"])
def test_leak__test_images_and_labels_choose_nothing(
    make_evaluation: Make, settings: LinearProbeSettings
) -> None:
    evaluation = make_evaluation()
    honest = linear_probe(evaluation, settings)
    permuted = linear_probe(_permuted_test(evaluation), settings)
    assert honest.results[0].facts == permuted.results[0].facts
    assert honest.curves == permuted.curves
    # The labels did change: what was right before is wrong now.
    assert permuted.results[0].metrics["top1"] < honest.results[0].metrics["top1"]
    assert honest.results[0].confusion is not None
    assert permuted.results[0].confusion is not None
    moved = np.roll(honest.results[0].confusion, 1, axis=0)
    assert permuted.results[0].confusion.tolist() == moved.tolist()


def test_sgd__one_step_by_hand() -> None:
    # Logits 0, 0 -> softmax 1/2, 1/2. Mean gradient of the weights for class 0: over the rows
    # (1 -> class 0) and (-1 -> class 1): ((1/2 - 1) * 1 + (1/2) * -1) / 2 = -1/2.
    heads = Heads({"x": 1}, 2, batch_norm=False, seed=0, device=torch.device("cpu"))
    torch.nn.init.zeros_(heads.modules["x"][0].weight)
    batch = HeadBatch({"x": torch.tensor([[1.0], [-1.0]])}, torch.tensor([0, 1]))
    settings = LinearProbeSettings(epochs=1, lr=0.1, momentum=0, batch_norm=False)
    course = train_heads(heads, lambda number: iter([batch]), settings, lambda done: None)
    assert heads.modules["x"][0].weight.flatten().tolist() == pytest.approx([0.05, -0.05])
    assert course.losses["x"] == [(1, pytest.approx(np.log(2)))]


def test_sgd__rate_falls_at_the_authors_shares_of_the_epochs() -> None:
    heads = Heads({"x": 1}, 2, batch_norm=False, seed=0, device=torch.device("cpu"))
    seen: list[float] = []

    def epoch(number: int) -> Iterator[HeadBatch]:
        before = heads.modules["x"][0].bias.detach().clone()
        yield HeadBatch({"x": torch.zeros(1, 1)}, torch.tensor([0]))
        seen.append(float((heads.modules["x"][0].bias.detach() - before).abs().max()))

    settings = LinearProbeSettings(epochs=12, lr=1e-3, momentum=0, batch_norm=False)
    course = train_heads(heads, epoch, settings, lambda done: None)
    assert course.facts["milestones"] == [5, 8, 10]
    assert (
        np.log10(np.array(seen) / seen[0]).round().tolist()
        == [0] * 5 + [-1] * 3 + [-2] * 2 + [-3] * 2
    )


def test_sgd__official_quirks_keep_the_first_statistics_and_drop_the_last_epoch() -> None:
    batch = HeadBatch({"x": torch.tensor([[10.0], [14.0]])}, torch.tensor([0, 1]))
    norms = {}
    for quirks in (False, True):
        heads = Heads({"x": 1}, 2, batch_norm=True, seed=0, device=torch.device("cpu"))
        settings = LinearProbeSettings(epochs=3, lr=0.01, official_quirks=quirks)
        course = train_heads(heads, lambda number: iter([batch]), settings, lambda done: None)
        norms[quirks] = heads.modules["x"][0]
        assert course.facts["epochs_trained"] == (2 if quirks else 3)
    assert float(norms[True].running_mean) == 0
    assert float(norms[True].running_var) == 1
    # After three batches of mean 12 with torch's momentum of 0.1: 12 * (1 - 0.9^3).
    assert float(norms[False].running_mean) == pytest.approx(12 * (1 - 0.9**3))


def test_sgd__that_diverges_says_what_to_change() -> None:
    heads = Heads({"x": 1}, 2, batch_norm=False, seed=0, device=torch.device("cpu"))
    batch = HeadBatch({"x": torch.tensor([[float("inf")]])}, torch.tensor([0]))
    with pytest.raises(EvaluationError, match=r"lower settings\.lr"):
        train_heads(heads, lambda n: iter([batch]), SGD, lambda done: None)


def test_probe__of_several_layers_gives_each_a_result(make_evaluation: Make) -> None:
    layers = ("block1", "block4@1", "features")
    settings = LinearProbeSettings(layers=layers, epochs=2, batch_size=32)
    outcome: Outcome = linear_probe(make_evaluation(), settings)
    assert [each.name for each in outcome.results] == list(layers)
    assert set(outcome.curves[0].lines) == set(layers)


def test_layers__of_a_resnet_are_pooled_to_the_papers_grid() -> None:
    config = EncoderConfig(
        backbone="resnet18", image_size_px=16, head="linear", dim=8, normalise=False
    )
    encoder = build_encoder(config).eval()
    layers = expanded(encoder, ("stem", "layer3.0", "layer4.1@2", "layer4.1", "features"))
    found = encode_with(encoder, layers)(torch.rand(2, 3, 16, 16))
    # Without a stem that shrinks sides are 16, 16, 8, 4, 2 px: 64 channels are pooled to 12 x 12,
    # 256 to 6 x 6 but there are 4, the last stage to 1 x 1 unless asked otherwise.
    assert {name: rows.shape[1] for name, rows in found.items()} == {
        "stem": 64 * 144,
        "layer3.0": 256 * 16,
        "layer4.1@2": 512 * 4,
        "layer4.1": 512,
        "features": 512,
    }
    assert torch.equal(found["layer4.1"], found["features"])
    assert len(expanded(encoder, ("blocks",))) == 9  # the stem and eight blocks


def test_probe__of_a_layer_that_is_not_there(make_evaluation: Make) -> None:
    with pytest.raises(JobError, match=r"no layer 'layer4\.1'.*block1, block2, block3, block4"):
        linear_probe(make_evaluation(), LinearProbeSettings(layers=("layer4.1",)))


def test_probe__on_augmented_views_learns_and_repeats(make_evaluation: Make) -> None:
    settings = LinearProbeSettings(epochs=4, batch_size=16, lr=0.5, augment=True)
    outcome = linear_probe(make_evaluation(), settings)
    assert outcome.results[0].untrained is None  # not cheap: each epoch is encoded anew
    losses = [value for _, value in outcome.curves[0].lines["features"]]
    assert losses[-1] < losses[0]
    assert linear_probe(make_evaluation(), settings).curves == outcome.curves


def test_probe__chooses_on_the_sets_own_validation_split(
    make_evaluation: Make, packed_folder: Any, tmp_path: Any
) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.npz").write_bytes((packed_folder / f"{name}.npz").read_bytes())
    (tmp_path / "val.npz").write_bytes((packed_folder / "test.npz").read_bytes())
    outcome = linear_probe(make_evaluation(root=str(tmp_path)), LBFGS)
    assert outcome.results[0].facts["validation"] == "the set's own"
    assert outcome.results[0].facts["fitted_on"] == 90
