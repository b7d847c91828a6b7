"""Detection: the detector's parts, its schedule, its batches, and that it learns by heart.

Run: pytest tests/trainer/evaluation/test_detection.py
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.trainer.evaluation.conftest import write_small_bundle
from tests.trainer.evaluation.photo_tree import CLASSES, write_photo_tree
from trainer.config import EncoderConfig
from trainer.datasets import DataError
from trainer.encoder import Encoder, build_encoder
from trainer.evaluation.box_precision import Detections
from trainer.evaluation.context import Evaluation, Network, state_digest
from trainer.evaluation.detection import detection, mistakes_of
from trainer.evaluation.detector import build_detector
from trainer.evaluation.detector_training import (
    decay_groups,
    schedule_of,
    settle_statistics,
    train_detector,
    training_batches,
)
from trainer.evaluation.job import JobError
from trainer.evaluation.labelled import Boxes
from trainer.evaluation.outcome import EvaluationError
from trainer.evaluation.protocol_settings import DetectionSettings

Make = Callable[..., Evaluation]
Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]
KINDS = ["dark", "light"]
SMALL = DetectionSettings(
    iterations=10,
    batch_size=2,
    lr=0.02,
    warmup=2,
    short_sides_px=(48,),
    test_short_side_px=48,
    long_side_px=64,
    anchors_px=(16, 32),
    rois=8,
    roi_size=4,
    precise_batches=2,
)


def resnet(seed: int = 0, side: int = 72) -> Encoder:
    config = EncoderConfig(
        backbone="resnet18", image_size_px=side, head="linear", dim=8, normalise=False
    )
    torch.manual_seed(seed)
    return build_encoder(config).eval()


@pytest.fixture
def evaluation(make_evaluation: Make, voc_tree: Path) -> Evaluation:
    """Dark and light scenes, each with an object in its upper left, and a ResNet-18."""
    made = make_evaluation(kind="voc", root=str(voc_tree), class_names=KINDS)
    return dataclasses.replace(made, trained=Network(resnet(), "resnet"))


def test_schedule__is_the_authors_and_for_sixteen_images_mocos() -> None:
    ours = schedule_of(DetectionSettings())
    assert ours == (96_000, 0.005, 400, (72_000, 88_000))
    assert schedule_of(DetectionSettings(batch_size=16)) == (24_000, 0.02, 100, (18_000, 22_000))
    rates = [ours.rate(at, 0.1) for at in (0, 200, 400, 71_999, 72_000, 88_000)]
    half = (0.001 + 1) / 2
    assert rates == pytest.approx([5e-6, 0.005 * half, 0.005, 0.005, 5e-4, 5e-5])
    given = DetectionSettings(batch_size=8, iterations=10, lr=0.1, warmup=0, milestones=(5,))
    assert schedule_of(given) == (10, 0.1, 0, (5,))


@pytest.mark.parametrize(("side", "stride"), [(72, 16), (32, 4)], ids=["ImageNet", "CIFAR stem"])
def test_detector__is_the_encoders_own_layers_and_all_of_it_learns(side: int, stride: int) -> None:
    encoder = resnet(side=side)
    detector = build_detector(encoder, 2, SMALL, seed=0)
    assert detector.backbone.stride_px == stride
    assert detector.backbone.out_channels == 256
    own = {id(each) for each in detector.parameters()}
    assert {id(each) for each in encoder.backbone.parameters()} <= own
    assert all(each.requires_grad for each in detector.parameters())
    head = detector.roi_heads.box_head
    assert head[0] is encoder.backbone.layer4
    assert isinstance(head[1], nn.BatchNorm2d)
    again = build_detector(resnet(side=side), 2, SMALL, seed=0)
    other = build_detector(resnet(side=side), 2, SMALL, seed=1)
    weights = [each.rpn.head.cls_logits.weight for each in (detector, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_decay__spares_the_normalisations() -> None:
    detector = build_detector(resnet(), 2, SMALL, seed=0)
    decays, spared = decay_groups(detector, 0.1)
    assert (decays["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    assert all(each.ndim == 1 for each in spared["params"])
    assert len(spared["params"]) == 2 * (15 + 5 + 1)  # body, layer4, the extra one
    assert len(decays["params"]) + len(spared["params"]) == len(list(detector.parameters()))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_batches__boxes_lie_on_their_objects(
    make_evaluation: Make, tmp_path: Path, flip: float
) -> None:
    root = tmp_path / "tree"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[8:24, 10:30] = 255  # rows 8..23, columns 10..29: in VOC's words 11..30 and 9..24
    Image.fromarray(pixels).save(root / "JPEGImages" / "a.jpg", quality=100)
    for name in ("trainval", "test"):
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")
    box = "<bndbox><xmin>11</xmin><ymin>9</ymin><xmax>30</xmax><ymax>24</ymax></bndbox>"
    listed = "".join(f"<object><name>{name}</name>{box}</object>" for name in KINDS)
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{listed}</annotation>")
    evaluation = make_evaluation(kind="voc", root=str(root), class_names=KINDS)
    settings = SMALL.model_copy(update={"flip": flip})
    ((images, targets),) = training_batches(evaluation, np.array([0]), settings, 1)
    left, top, right, low = (int(side) for side in targets[0]["boxes"][0])
    assert (left, top, right, low) == ((30, 8, 50, 24) if flip else (10, 8, 30, 24))
    assert float(images[0][:, top:low, left:right].min()) > 0.9
    assert float(images[0].mean()) == pytest.approx(20 * 16 / 2400, abs=0.01)
    assert targets[0]["labels"].tolist() == [1, 2]  # 0 is torchvision's background


def test_batches__take_each_image_once_before_any_twice(evaluation: Evaluation) -> None:
    rows = np.arange(24)
    boxes = evaluation.dataset.train.boxes
    assert boxes is not None
    settings = SMALL.model_copy(update={"batch_size": 4, "flip": 0})
    batches = list(training_batches(evaluation, rows, settings, 6))
    shown = torch.stack([image for images, _ in batches for image in images]).flatten(1)
    assert len(torch.unique(shown, dim=0)) == 24


class _Norm(nn.Module):
    """A stand-in for a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, images: list[Tensor], targets: object) -> None:
        self.norm(torch.stack(images))


def test_statistics__are_the_mean_over_the_batches_left() -> None:
    module = _Norm()
    module.norm.running_mean.fill_(99)
    batches = [([torch.tensor([a]), torch.tensor([b])], []) for a, b in ((0.0, 2.0), (4.0, 8.0))]
    settle_statistics(module, iter(batches))  # type: ignore[arg-type]
    assert float(module.norm.running_mean) == pytest.approx((1 + 6) / 2)
    assert float(module.norm.running_var) == pytest.approx((2 + 8) / 2)
    assert module.norm.momentum == 0.1
    settle_statistics(module, iter([]))  # type: ignore[arg-type]
    assert float(module.norm.running_mean) == pytest.approx((1 + 6) / 2)


def test_mistakes__are_confident_detections_on_objects_of_another_class() -> None:
    there = [
        Boxes(
            np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32),
            np.array([0, 1]),
            np.zeros(2, bool),
        )
    ]
    on_first, on_second, nowhere = [0, 0, 10, 9], [50, 50, 60, 59], [80, 80, 90, 90]
    found = Detections(
        np.array([on_first, on_first, on_second, nowhere, on_second], np.float32),
        np.array([0, 1, 0, 0, 0]),
        np.array([0.9, 0.6, 0.8, 0.99, 0.4], np.float32),
    )
    mistakes = mistakes_of([found], there, np.array([7]))
    # Right, wrong by 0.6, wrong by 0.8, on nothing, too unsure.
    assert [(each.row, each.label, each.predicted) for each in mistakes] == [(7, 1, 0), (7, 0, 1)]
    assert [each.margin for each in mistakes] == pytest.approx([0.8, 0.6])


def test_detection__learns_repeats_and_leaves_the_encoder_alone(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Network(resnet(seed=3), "untrained")
    monkeypatch.setattr(Evaluation, "untrained", lambda self: twin)
    few = {name: part.subset(np.arange(6)) for name, part in evaluation.dataset.splits.items()}
    evaluation = dataclasses.replace(
        evaluation, dataset=dataclasses.replace(evaluation.dataset, splits=few)
    )
    before = state_digest(evaluation.trained.encoder)
    settings = SMALL.model_copy(update={"untrained": True})
    outcome = detection(evaluation, settings)
    assert state_digest(evaluation.trained.encoder) == before
    (result,) = outcome.results
    assert outcome.headline == "ap"
    assert set(result.metrics) == {"ap", "ap50", "ap75"}
    assert result.untrained is not None
    assert set(result.gains) == set(result.intervals) == set(result.metrics)
    # Tested: 4 dark, 2 light; 2 difficult light ones do not count.
    assert [row["count"] for row in result.per_class] == [4, 2]
    lines = outcome.curves[0].lines
    assert {"classifier", "box_reg", "objectness", "rpn_box_reg"} < set(lines)
    first, last = (np.mean([lines[n][i][1] for n in ("classifier", "objectness")]) for i in (0, -1))
    assert last < first
    # Test labels and images decide nothing, and the same seed gives the same numbers.
    dataset = evaluation.dataset
    backwards = dataset.test.subset(np.arange(len(dataset.test))[::-1])
    assert backwards.boxes is not None
    swapped = tuple(boxes._replace(labels=1 - boxes.labels) for boxes in backwards.boxes)
    wrong = dataclasses.replace(backwards, boxes=swapped)
    permuted = dataclasses.replace(
        evaluation, dataset=dataclasses.replace(dataset, splits={**dataset.splits, "test": wrong})
    )
    again = detection(permuted, SMALL)
    assert again.curves[0].lines == {
        name: points for name, points in lines.items() if "untrained" not in name
    }


def test_detection__that_diverges_says_what_to_lower(evaluation: Evaluation) -> None:
    detector = build_detector(evaluation.fresh_copy(), 2, SMALL, seed=0)
    nn.init.constant_(detector.roi_heads.box_predictor.cls_score.bias, float("nan"))
    with pytest.raises(EvaluationError, match=r"lower settings\.lr than 0\.02"):
        train_detector(evaluation, detector, np.arange(24), SMALL, schedule_of(SMALL), "x")


def test_detection__of_what_it_cannot_be_asked_for(
    make_evaluation: Make, evaluation: Evaluation, voc_tree: Path
) -> None:
    with pytest.raises(JobError, match="detection wants a data set with boxes"):
        detection(make_evaluation(), SMALL)
    plain = make_evaluation(kind="voc", root=str(voc_tree), class_names=KINDS)
    with pytest.raises(JobError, match="wants a bundle whose encoder is a ResNet"):
        detection(plain, SMALL)
    dataset = evaluation.dataset
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    for split, said in (("test", "no test image shows an object"), ("train", "no training image")):
        part = dataset.splits[split]
        empty = dataclasses.replace(part, boxes=(nothing,) * len(part))
        changed = dataclasses.replace(dataset, splits={**dataset.splits, split: empty})
        with pytest.raises(DataError, match=said):
            detection(dataclasses.replace(evaluation, dataset=changed), SMALL)


def test_trees__several_below_one_root(make_evaluation: Make, voc_tree: Path) -> None:
    (voc_tree.parent / "VOC2012").symlink_to(voc_tree)
    splits = {"train": "VOC2007/trainval+VOC2012/trainval", "test": "VOC2007/test"}
    root = str(voc_tree.parent)
    dataset = make_evaluation(kind="voc", root=root, class_names=KINDS, splits=splits).dataset
    assert len(dataset.train) == 48
    assert dataset.train.source.ids[24] == "VOC2012/JPEGImages/train00.jpg"
    assert dataset.train.boxes is not None
    assert len(dataset.train.boxes) == 48
    assert len(dataset.test) == 12
    for train, said in (
        ("VOC2007/trainval+VOC2007/trainval", "names an image twice"),
        ("../VOC2007/trainval", "lies outside root"),
        ("VOC2010/trainval", "lacks JPEGImages"),
    ):
        wrong = {**splits, "train": train}
        with pytest.raises(DataError, match=said):
            make_evaluation(kind="voc", root=root, class_names=KINDS, splits=wrong)


def test_tree__with_a_box_without_area(make_evaluation: Make, voc_tree: Path) -> None:
    path = voc_tree / "Annotations" / "train03.xml"
    path.write_text(path.read_text().replace("<xmax>10</xmax>", "<xmax>0</xmax>"))
    with pytest.raises(DataError, match=r"train03\.xml .* whose box has no area"):
        make_evaluation(kind="voc", root=str(voc_tree), class_names=KINDS)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_photos__are_learned_by_heart(run_job: Run, tmp_path: Path) -> None:
    """A minute of CPU: from a tree of real photos to the report, by the command."""
    root = write_photo_tree(tmp_path / "photos", scenes=8)
    bundle = write_small_bundle(tmp_path / "bundle", "encoder.backbone=resnet18", side=72)
    code, lines, output = run_job(
        protocol="detection",
        bundle=str(bundle),
        dataset={"name": "photos", "kind": "voc", "root": str(root), "class_names": CLASSES},
        settings={
            "iterations": 140,
            "batch_size": 2,
            "lr": 0.02,
            "warmup": 10,
            "short_sides_px": [128],
            "test_short_side_px": 128,
            "long_side_px": 128,
            "anchors_px": [32, 64],
            "rois": 16,
            "roi_size": 6,
            "precise_batches": 16,
        },
    )
    assert code == 0, lines[-1]
    report = json.loads((output / "report.json").read_text())
    metrics = report["results"][0]["metrics"]
    assert metrics["ap50"] >= 0.9, metrics
    assert report["encoder"]["sha256_before"] == report["encoder"]["sha256_after"]
    assert "Training losses" in (output / "report.html").read_text()
