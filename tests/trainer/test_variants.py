from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from trainer import variants as variants_module
from trainer.config import EncoderConfig, ExportConfig
from trainer.encoder import Encoder, build_encoder
from trainer.onnx_graph import CPU, ExportError, OnnxGraph, build_graph, published_copy
from trainer.representation.bundle import Variant
from trainer.representation.preprocess import InputContract, fit_array
from trainer.variants import (
    CUDA,
    Made,
    make_variants,
    measure,
    measure_speed,
    missed_floor,
    told,
)

COUNT = 60
CONTRACT = InputContract(size_px=16)
_digits = np.rint(load_digits().images[:COUNT] * (255 / 16)).astype(np.uint8)
IMAGES = np.stack([fit_array(digit, CONTRACT) for digit in _digits])
LABELS = load_digits().target[:COUNT].astype(np.int64)
BOTH = ExportConfig(variants=("fp16", "int8"), calibration_images=20)


def prepared(positions: Sequence[int]) -> NDArray[np.uint8]:
    return IMAGES[list(positions)]


def trained_encoder() -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(backbone="small", image_size_px=16, head="linear", dim=8, normalise=True)
    encoder = build_encoder(config).train()
    with torch.no_grad():
        for _ in range(20):
            encoder(torch.tensor(IMAGES).permute(0, 3, 1, 2) / 255)
    return encoder


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    return build_graph(published_copy(trained_encoder()))


def made(graph: OnnxGraph, config: ExportConfig = BOTH, **changes: Any) -> Made:
    arguments: dict[str, Any] = {
        "prepared": prepared,
        "embeddings": graph.run(IMAGES)["embedding"],
        "labels": LABELS,
    }
    return make_variants(graph, config, **{**arguments, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants_module, "SPEED_LEAST_S", 1e-4)


def test_variants__state_what_was_measured(graph: OnnxGraph) -> None:
    lines: list[str] = []
    found = made(graph, say=lines.append)
    assert list(found.variants) == ["fp16", "int8"]
    for name, least in (("fp16", 0.9999), ("int8", 0.99)):
        variant = found.variants[name]
        assert variant.graph is not None
        assert variant.reason is None
        figures = variant.figures
        assert least < figures["cosine"]["min"] <= figures["cosine"]["mean"] < 1
        assert figures["images"] == 40
        assert figures["held_apart"]
        assert figures["provider"] == CPU
        knn = figures["knn"]
        assert knn["k"] == 59
        assert knn["drop"] == knn["fp32"] - knn["variant"]
        assert abs(knn["drop"]) <= 0.05
    assert found.variants["int8"].figures["calibration"]["images"] == 20
    assert lines == [told(name, variant) for name, variant in found.variants.items()]
    assert lines[1].startswith("int8 graph: cosine to fp32 at least 0.99")


def test_variants__speeds_stand_beside_fp32_of_the_same_run(graph: OnnxGraph) -> None:
    speed = made(graph).speed
    (run,) = speed["runs"]
    assert (run["provider"], run["threads"], run["batch"]) == (CPU, 1, 8)
    assert set(run["images_per_s"]) == {"fp32", "int8"}
    assert min(run["images_per_s"].values()) > 0
    # Nothing is invented for what a CPU does not run as it is.
    assert set(speed["not_timed"]) == {"fp16"}
    assert "ran on a CPU" in speed["not_timed"]["fp16"]


def test_variants__twice_are_the_same_but_for_the_speed(graph: OnnxGraph) -> None:
    assert made(graph).variants == made(graph).variants


def test_variants__calibration_and_measurement_share_no_image(graph: OnnxGraph) -> None:
    asked: list[list[int]] = []

    def recorded(positions: Sequence[int]) -> NDArray[np.uint8]:
        asked.append(list(positions))
        return prepared(positions)

    made(graph, ExportConfig(variants=("int8",), calibration_images=20), prepared=recorded)
    calibrating = [position for block in asked[:3] for position in block]
    assert [len(block) for block in asked] == [8, 8, 4, 32, 8, 8]
    measuring = [position for block in asked[3:5] for position in block]
    assert sorted(calibrating + measuring) == list(range(COUNT))
    assert calibrating != sorted(calibrating)  # drawn, not the first ones


@pytest.mark.parametrize(("count", "calibrating", "apart"), [(7, 3, True), (1, 1, False)])
def test_variants__of_few_images_at_most_half_calibrate(
    graph: OnnxGraph, count: int, calibrating: int, apart: bool
) -> None:
    embeddings = graph.run(IMAGES[:count])["embedding"]
    figures = made(graph, embeddings=embeddings, labels=LABELS[:count]).variants["int8"].figures
    assert figures["calibration"]["images"] == calibrating
    assert figures["held_apart"] is apart
    assert (figures["knn"] is None) == (count == 1)


def test_variants__without_labels_no_accuracy_is_stated(graph: OnnxGraph) -> None:
    found = made(graph, labels=None).variants
    assert [variant.figures["knn"] for variant in found.values()] == [None, None]
    assert "kNN" not in told("int8", found["int8"])


def test_variants__none_asked_for(graph: OnnxGraph) -> None:
    assert made(graph, ExportConfig(variants=(), calibration_images=20)) == ({}, {})


def test_variants__one_below_its_floor_is_left_out_with_its_figures(
    graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(content: bytes, batches: Any) -> bytes:
        """Calibrated with black images: every activation of a real one is cut off."""
        return variants_module_int8(content, [0 * images for images in batches])

    variants_module_int8 = variants_module.int8_graph
    monkeypatch.setattr(variants_module, "int8_graph", coarse)
    lines: list[str] = []
    found = made(graph, say=lines.append)
    variant = found.variants["int8"]
    assert variant.graph is None
    assert variant.reason is not None
    assert "smallest cosine to fp32 is" in variant.reason
    assert variant.figures["cosine"]["min"] < 0.99
    assert lines[1] == f"WARNING: no int8 graph in the bundle: {variant.reason}"
    assert found.variants["fp16"].graph is not None  # the other one is not concerned
    assert found.speed["not_timed"]["int8"] == "left out"
    assert set(found.speed["runs"][0]["images_per_s"]) == {"fp32"}


def test_variants__one_that_cannot_be_made_is_left_out(
    graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(content: bytes, batches: Any) -> bytes:
        raise ExportError("relu_3 takes values that are not finite on the training images")

    monkeypatch.setattr(variants_module, "int8_graph", refused)
    variant = made(graph).variants["int8"]
    assert (variant.graph, variant.reason) == (
        None,
        "relu_3 takes values that are not finite on the training images",
    )


def test_variants__on_cuda_that_does_not_load_fp16_is_measured_here_and_not_timed(
    graph: OnnxGraph,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA loads on this machine")
    found = made(graph, ExportConfig(variants=("fp16",), calibration_images=20), provider=CUDA)
    assert found.variants["fp16"].figures["provider"] == CPU
    assert "does not load CUDAExecutionProvider" in found.speed["not_timed"]["fp16"]
    assert [run["provider"] for run in found.speed["runs"]] == [CPU]


EMBEDDINGS = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float32)
CLASSES = np.array([0, 0, 1, 1])


def measured(answers: Any, labels: Any = CLASSES) -> dict[str, Any]:
    rows = np.array(answers, np.float32)

    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        return {"embedding": rows[images[:, 0, 0, 0]]}

    def numbered(positions: Sequence[int]) -> NDArray[np.uint8]:
        return np.array(positions, np.uint8)[:, None, None, None]

    return measure(run, numbered, np.arange(4), EMBEDDINGS, labels)


def test_measure__by_hand() -> None:
    answers = EMBEDDINGS.copy()
    answers[1] = [0.6, 0.8]  # cosine 0.48 + 0.48 to its own
    figures = measured(answers)
    assert figures["images"] == 4
    assert figures["cosine"]["min"] == pytest.approx(0.96)
    assert figures["cosine"]["mean"] == pytest.approx(0.99)
    assert figures["length_error"] == pytest.approx(0, abs=1e-6)
    # All three others vote, the nearest most: image 1 is nearest to 3 and 2 now, of class 1.
    # With fp32 its votes at t = 0.07 are 0.96 (class 1) and 0.8 (class 0): wrong there too.
    assert figures["knn"] == {"fp32": 0.5, "variant": 0.5, "drop": 0.0, "k": 3}
    figures = measured([[0, 1], [0, 1], [0, 1], [0, 1]])
    assert figures["knn"] == {"fp32": 0.5, "variant": 0.5, "drop": 0.0, "k": 3}


def test_measure__a_variant_that_turns_an_image_to_the_other_class() -> None:
    answers = EMBEDDINGS.copy()
    answers[0] = [0, 1]
    knn = measured(answers)["knn"]
    assert (knn["fp32"], knn["variant"], knn["drop"]) == (0.5, 0.25, 0.25)


def test_measure__values_that_are_not_finite_are_none() -> None:
    answers = EMBEDDINGS.copy()
    answers[2, 0] = np.nan
    figures = measured(answers)
    assert figures["cosine"] == {"min": None, "mean": None}
    assert figures["length_error"] is None
    assert figures["knn"] is None
    assert missed_floor(figures) == "it answers values that are not finite"


def figures_of(
    *, least: float = 0.995, length: float = 0.0, drop: float | None = 0.0, images: int = 1000
) -> dict[str, Any]:
    knn = None if drop is None else {"fp32": 0.75, "variant": 0.75 - drop, "drop": drop, "k": 200}
    return {
        "images": images,
        "cosine": {"min": least, "mean": 0.999},
        "length_error": length,
        "knn": knn,
    }


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (figures_of(), None),
        (figures_of(least=0.99), None),
        (figures_of(least=0.9899), "its smallest cosine to fp32 is 0.9899, wanted 0.99 at least"),
        (figures_of(length=2e-3), "a length is 0.002 off 1, wanted 0.001 at most"),
        (figures_of(drop=0.005), None),
        (figures_of(drop=0.006), "is 0.7440 where fp32 has 0.7500: 0.60 points less, wanted 0.5"),
        (figures_of(drop=0.006, images=999), None),  # one image in 999 is chance
        (figures_of(drop=-0.02), None),
        (figures_of(drop=None), None),
    ],
)
def test_floor__by_hand(figures: dict[str, Any], said: str | None) -> None:
    missed = missed_floor(figures)
    assert (missed is None) if said is None else (said in str(missed))


def test_told__of_a_variant_that_is_not_there() -> None:
    assert told("fp16", Variant(None, "too far", {})).endswith(
        "no fp16 graph in the bundle: too far"
    )


def test_speed__takes_turns_and_the_median() -> None:
    order: list[str] = []

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, outputs: None, given: dict[str, Any]) -> None:
            order.append(self.name)

    images = np.zeros((8, 2, 2, 3), np.uint8)
    speed = measure_speed({"fp32": Session("a"), "int8": Session("b")}, images, rounds=3)
    assert speed["batch"] == 8
    assert set(speed["images_per_s"]) == {"fp32", "int8"}
    turns = [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    assert turns == ["a", "b"] * 4  # one to warm up, three rounds
