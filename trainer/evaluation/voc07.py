"""`voc07_svm`: VOC07 classification, several classes an image, one linear classifier for each.

In: an evaluation of a VOC tree, settings. Out: mean average precision on the test images. C is
chosen for each class by cross-validation on the training images; images on which a class is
difficult count for that class neither in training nor in testing.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from torch import nn

from trainer.datasets import DataError
from trainer.evaluation.average_precision import (
    area,
    area_as_it_is,
    eleven_point,
    precision_and_recall,
)
from trainer.evaluation.context import Evaluation, Network
from trainer.evaluation.dataset_specs import TEST, TRAIN
from trainer.evaluation.features import Extracted, extract
from trainer.evaluation.job import JobError
from trainer.evaluation.layers import expanded
from trainer.evaluation.outcome import Curve, EvaluationError, Outcome, Result, bootstrap
from trainer.evaluation.protocol_settings import Voc07Settings
from trainer.evaluation.votes import unit_rows

Rows = NDArray[np.float32]
Targets = NDArray[np.int8]  # 1 there, 0 not, -1 difficult

BOOTSTRAP_DRAWS = 200  # each sorts the test items once for every class
MAX_ITER = 2000  # of the SVM's solver
# Goyal et al. (2019), whose protocol others report: a positive image counts twice.
CLASS_WEIGHT = {True: 2.0, False: 1.0}
RULES = {"map_11point": eleven_point, "map_area": area, "map_unsmoothed": area_as_it_is}


class _Scored(NamedTuple):
    scores: NDArray[np.float64]  # (N, C) of the test images
    targets: Targets  # (N, C)
    per_class: list[dict[str, Any]]  # what was chosen
    curves: list[Curve]


def voc07_svm(evaluation: Evaluation, settings: Voc07Settings) -> Outcome:
    """Mean average precision by the 11-point rule, by the area, and unsmoothed."""
    if evaluation.dataset.train.targets is None:
        raise JobError(
            f"voc07_svm wants a data set with several classes an image, kind `voc`; "
            f"{evaluation.dataset.name} is {evaluation.dataset.kind}: ask for linear_probe"
        )
    layers = expanded(evaluation.trained.encoder, (settings.layer,))
    if not (_targets(evaluation, TEST) == 1).any():
        raise DataError(f"data set {evaluation.dataset.name}: no test image shows any class")
    if len(layers) != 1:
        raise JobError(f"settings.layer={settings.layer!r} names {len(layers)} layers, wanted one")
    run = _by_svm if settings.classifier == "svm" else _by_sgd
    trained = run(evaluation, evaluation.trained, layers[0], settings)
    baseline = run(evaluation, evaluation.untrained(), layers[0], settings)
    precisions = {rule: _precisions(trained.scores, trained.targets, rule) for rule in RULES}
    result = Result(
        name=f"{settings.classifier} on {layers[0]}",
        metrics=_means(trained.scores, trained.targets),
        intervals=bootstrap(
            lambda rows: _means(trained.scores[rows], trained.targets[rows]),
            len(trained.scores),
            seed=evaluation.seed,
            draws=BOOTSTRAP_DRAWS,
        ),
        per_class=[
            {
                "class": name,
                "count": int((trained.targets[:, seat] == 1).sum()),
                **{rule[1:]: each[seat] for rule, each in precisions.items()},
                **trained.per_class[seat],
            }
            for seat, name in enumerate(evaluation.dataset.class_names)
        ],
        untrained=_means(baseline.scores, baseline.targets),
        gains=bootstrap(
            lambda rows: {
                name: value - _means(baseline.scores[rows], trained.targets[rows])[name]
                for name, value in _means(trained.scores[rows], trained.targets[rows]).items()
            },
            len(trained.scores),
            seed=evaluation.seed,
            draws=BOOTSTRAP_DRAWS,
        ),
        facts={"classifier": settings.classifier, "layer": layers[0]},
    )
    return Outcome([result], headline="map_11point", curves=trained.curves)


def mean_average_precision(scores: NDArray[np.float64], targets: Targets, rule: str) -> float:
    """The mean over the classes that are there of the average precision by one of `RULES`."""
    found = [each for each in _precisions(scores, targets, rule) if each is not None]
    return float(np.mean(found)) if found else float("nan")


def _means(scores: NDArray[np.float64], targets: Targets) -> dict[str, float]:
    return {rule: mean_average_precision(scores, targets, rule) for rule in RULES}


def _precisions(scores: NDArray[np.float64], targets: Targets, rule: str) -> list[float | None]:
    """Of each class; None where no image shows it."""
    found: list[float | None] = []
    for own, there in zip(scores.T, targets.T, strict=True):
        counted = there >= 0
        positive = there[counted] == 1
        if not positive.any():
            found.append(None)
            continue
        found.append(RULES[rule](*precision_and_recall(own[counted], positive)))
    return found


def _by_svm(
    evaluation: Evaluation, network: Network, layer: str, settings: Voc07Settings
) -> _Scored:
    train, targets = _split(evaluation, network, TRAIN, layer)
    rows = unit_rows(train.values[layer])
    classes = evaluation.dataset.class_names
    models: list[LinearSVC] = []
    chosen: list[dict[str, Any]] = []
    said = "linear SVMs" if network is evaluation.trained else "linear SVMs, untrained encoder"
    for seat, name in enumerate(classes):
        evaluation.progress(said, seat, len(classes))
        counted = targets[:, seat] >= 0
        own, there = rows[counted], targets[counted, seat] == 1
        if there.all() or not there.any():
            raise EvaluationError(
                f"{int(there.sum())} of {len(there)} training images that can be used show the "
                f"class {name!r}: wanted some with it and some without"
            )
        c, tried = _choose_c(own, there, settings, seed=evaluation.seed)
        models.append(_svm(own, there, c, seed=evaluation.seed))
        chosen.append({"c": c, "cross_validated_ap": tried})
    evaluation.progress(said, len(classes), len(classes))
    test, test_targets = _split(evaluation, network, TEST, layer)
    unit = unit_rows(test.values[layer])
    scores = np.stack([model.decision_function(unit) for model in models], axis=1)
    return _Scored(scores, test_targets, chosen, [])


def _choose_c(
    rows: Rows, there: NDArray[np.bool_], settings: Voc07Settings, *, seed: int
) -> tuple[float, dict[str, float] | None]:
    """The C of the highest mean average precision over the folds, the smallest of equals.

    Folds hold the class in equal shares. Of a class with fewer images than folds there are as many
    folds as images; a single image allows no choice, and takes the smallest C.
    """
    folds = min(settings.folds, int(there.sum()), int((~there).sum()))
    if folds < 2:
        return min(settings.c), None
    fold = np.empty(len(there), np.int64)
    draw = np.random.default_rng([seed, len(there)])
    for value in (True, False):
        members = draw.permutation(np.flatnonzero(there == value))
        fold[members] = np.arange(len(members)) % folds
    found: dict[float, float] = {}
    for c in sorted(settings.c):
        precisions = []
        for number in range(folds):
            held = fold == number
            model = _svm(rows[~held], there[~held], c, seed=seed)
            scores = model.decision_function(rows[held])
            precisions.append(area(*precision_and_recall(scores, there[held])))
        found[c] = float(np.mean(precisions))
    best = max(found, key=lambda c: (found[c], -c))
    return best, {f"{c:g}": value for c, value in found.items()}


def _svm(rows: Rows, there: NDArray[np.bool_], c: float, *, seed: int) -> LinearSVC:
    model = LinearSVC(C=c, class_weight=CLASS_WEIGHT, max_iter=MAX_ITER, random_state=seed)
    return model.fit(rows, there)


def _by_sgd(
    evaluation: Evaluation, network: Network, layer: str, settings: Voc07Settings
) -> _Scored:
    """The authors' voc_linear.py: one layer for all classes, binary cross-entropy."""
    train, targets = _split(evaluation, network, TRAIN, layer)
    device = evaluation.device
    rows = torch.from_numpy(train.values[layer]).to(device)
    wanted = torch.from_numpy(targets).to(device)
    generator = torch.Generator().manual_seed(evaluation.seed)
    linear = nn.Linear(rows.shape[1], targets.shape[1])
    with torch.no_grad():
        # torch's own rule for a layer, from a generator of our own.
        bound = rows.shape[1] ** -0.5
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    linear.to(device)
    optimiser = torch.optim.SGD(
        linear.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    said = "linear layer" if network is evaluation.trained else "linear layer, untrained encoder"
    points: list[tuple[float, float]] = []
    order = torch.empty(0, dtype=torch.int64)
    size = min(settings.batch_size, len(rows))
    for iteration in range(settings.iterations):
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator)
        batch, order = order[:size].to(device), order[size:]
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * settings.gamma ** (iteration // settings.step)
        counted = wanted[batch] >= 0
        losses = nn.functional.binary_cross_entropy_with_logits(
            linear(rows[batch]), wanted[batch].clamp(min=0).float(), reduction="none"
        )
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if iteration % 10 == 0 or iteration + 1 == settings.iterations:
            value = float(loss.detach())
            if not np.isfinite(value):
                raise EvaluationError(
                    f"the linear layer went to {value} in iteration {iteration + 1}: give a lower "
                    f"settings.lr than {settings.lr:g}"
                )
            points.append((iteration + 1, value))
            evaluation.progress(said, iteration + 1, settings.iterations)
    test, test_targets = _split(evaluation, network, TEST, layer)
    with torch.no_grad():
        scores = linear(torch.from_numpy(test.values[layer]).to(device)).double().cpu().numpy()
    curve = Curve("Training loss", "nats", {"loss": points}, "iteration")
    return _Scored(scores, test_targets, [{} for _ in range(targets.shape[1])], [curve])


def _split(
    evaluation: Evaluation, network: Network, split: str, layer: str
) -> tuple[Extracted, Targets]:
    found = extract(evaluation, network, split, (layer,))
    return found, _targets(evaluation, split)[found.rows]


def _targets(evaluation: Evaluation, split: str) -> Targets:
    targets = evaluation.dataset.splits[split].targets
    assert targets is not None  # asked at the beginning
    return targets
