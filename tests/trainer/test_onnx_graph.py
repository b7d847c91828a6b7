import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainer import onnx_graph
from trainer.encoder import Encoder, embed_images
from trainer.onnx_graph import (
    OPSET,
    ExportError,
    OnnxGraph,
    build_graph,
    check_graph,
    compare,
    measure_parity,
    published_copy,
)


def digits(count: int) -> np.ndarray:
    """Real pictures, (count, 8, 8, 3) uint8: the handwritten digits that scikit-learn carries."""
    grey = np.rint(load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def tiny_encoder(seed: int = 0, backbone: nn.Module | None = None) -> Encoder:
    torch.manual_seed(seed)
    if backbone is None:
        backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False))
    encoder = Encoder(backbone, head, feature_dim=6, dim=4, size_px=8)
    encoder(torch.rand(16, 3, 8, 8))  # statistics that differ from the fresh ones
    return encoder


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    return build_graph(published_copy(tiny_encoder()))


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_graph__answers_as_the_network_at_any_batch(graph: OnnxGraph, count: int) -> None:
    answered = graph.run(digits(count))
    features, embeddings = embed_images(tiny_encoder(), [digits(count)], "cpu")
    np.testing.assert_allclose(answered["features"], features, atol=1e-5)
    np.testing.assert_allclose(answered["embedding"], embeddings, atol=1e-5)
    assert answered["features"].dtype == answered["embedding"].dtype == np.float32


def test_graph__takes_uint8_rgb_and_says_what_it_is(graph: OnnxGraph) -> None:
    (given,) = graph.session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    assert given.shape == ["batch", 8, 8, 3]
    answers = {answer.name: answer.shape for answer in graph.session.get_outputs()}
    assert answers == {"features": ["batch", 6], "embedding": ["batch", 4]}
    facts = graph.session.get_modelmeta().custom_metadata_map
    assert facts["product"] == "invprop"
    assert facts["image_size_px"] == "8"
    assert (facts["feature_dim"], facts["embedding_dim"]) == ("6", "4")
    assert facts["embedding_l2_normalised"] == "true"
    assert onnx.load_from_string(graph.content).opset_import[0].version == OPSET


def test_graph__same_weights_same_bytes_and_no_noise(
    graph: OnnxGraph, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build_graph(published_copy(tiny_encoder())).content == graph.content
    assert capfd.readouterr() == ("", "")


def test_graph__other_weights_other_bytes(graph: OnnxGraph) -> None:
    assert build_graph(published_copy(tiny_encoder(seed=1))).content != graph.content


def test_graph__memory_layout_does_not_show(graph: OnnxGraph) -> None:
    encoder = tiny_encoder().to(memory_format=torch.channels_last)
    assert build_graph(published_copy(encoder)).content == graph.content


def test_graph__names_no_path_of_this_machine(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    repository = Path(onnx_graph.__file__).parents[1]
    for place in (repository, Path.home(), sys.prefix, tempfile.gettempdir(), "site-packages"):
        assert str(place).encode() not in graph.content
    assert b".py" not in graph.content  # no stack trace either
    assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
    assert [node.name for node in model.graph.node]  # there were nodes to look at


def test_published_copy__leaves_the_encoder_alone() -> None:
    encoder = tiny_encoder().to(torch.bfloat16).train()
    network = published_copy(encoder)
    assert encoder.training
    assert encoder.head[0].weight.dtype == torch.bfloat16
    assert not any(module.training for module in network.modules())
    assert network.encoder.head[0].weight.dtype == torch.float32
    assert network.encoder.head[0].weight is not encoder.head[0].weight


@pytest.mark.parametrize("name", ["backbone.0.weight", "backbone.1.running_var", "head.0.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_published_copy__weights_that_are_not_finite(name: str, value: float) -> None:
    encoder = tiny_encoder()
    encoder.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ExportError, match=rf"{name} holds 1 of \d+ values that are not finite"):
        published_copy(encoder)


def test_measure_parity__states_what_was_measured(graph: OnnxGraph) -> None:
    asked = []

    def prepared(positions: list[int]) -> np.ndarray:
        asked.append(list(positions))
        return digits(50)[positions]

    parity = measure_parity(published_copy(tiny_encoder()), graph, prepared, 50)
    assert asked == [[0], [5, 10], [15, 20, 25, 30, 35, 40, 45]]  # spread over the set
    assert parity["batch_sizes"] == [1, 2, 7]
    assert parity["images"] == 10
    assert parity["tolerance"] == {"max_abs": 1e-4, "min_cosine": 0.9999}
    for name in ("features", "embedding"):
        figures = parity["outputs"][name]
        assert list(figures) == ["1", "2", "7"]
        assert all(row["max_abs"] < 1e-5 for row in figures.values())
        assert all(0.99999 < row["min_cosine"] < 1.00001 for row in figures.values())


@pytest.mark.parametrize(("count", "images"), [(1, 1), (3, 3), (7, 7), (12, 10)])
def test_measure_parity__few_images_are_taken_again(
    graph: OnnxGraph, count: int, images: int
) -> None:
    asked: list[int] = []

    def prepared(positions: list[int]) -> np.ndarray:
        asked.extend(positions)
        return digits(count)[positions]

    parity = measure_parity(published_copy(tiny_encoder()), graph, prepared, count)
    assert len(asked) == 1 + 2 + 7
    assert parity["images"] == len(set(asked)) == images


class _OtherWhenExported(nn.Module):
    """A layer that the exporter does not see as it is: the fault a parity check is for."""

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = pixels.mean(dim=(2, 3)).repeat(1, 2)  # (B, 6)
        return pooled + (0.001 if torch.compiler.is_exporting() else 0.0)


def test_measure_parity__graph_of_another_network() -> None:
    network = published_copy(tiny_encoder(backbone=_OtherWhenExported()))
    with pytest.raises(
        ExportError, match=r"features at batch 1: .* differ by 0\.001 .at most 0\.0001"
    ):
        measure_parity(network, build_graph(network), lambda at: digits(10)[list(at)], 10)


def test_compare__by_hand() -> None:
    one = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    other = np.array([[1.0, 0.0], [0.0, 2.0000625]], np.float32)  # 2^-14 = 0.00006103515625
    figures = compare("features", one, other)
    assert figures["max_abs"] == pytest.approx(6.25e-5, rel=0.01)
    assert figures["min_cosine"] == pytest.approx(1.0)
    with pytest.raises(ExportError, match=r"embedding at batch 2: .* 0\.000125"):
        compare("embedding", one, one + np.float32(1.25e-4))


def test_compare__small_vectors_may_not_turn() -> None:
    """Differences below the absolute tolerance, but 45 degrees apart."""
    one, other = np.array([[5e-5, 0.0]], np.float32), np.array([[5e-5, 5e-5]], np.float32)
    with pytest.raises(ExportError, match=r"cosine 0\.707107 \(at least 0\.9999\)"):
        compare("features", one, other)


def test_compare__zeros_have_no_direction() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert compare("features", zeros, zeros) == {"max_abs": 0.0, "min_cosine": 1.0}


@pytest.mark.parametrize(("network", "graph"), [(np.nan, 1.0), (1.0, np.inf), (np.nan, np.nan)])
def test_compare__values_that_are_not_finite(network: float, graph: float) -> None:
    good = np.ones((1, 2), np.float32)
    one, other = good.copy(), good.copy()
    one[0, 1], other[0, 1] = network, graph
    with pytest.raises(ExportError, match=r"features at batch 1: the (network|graph) answers"):
        compare("features", one, other)


def test_compare__frozen_batch() -> None:
    with pytest.raises(ExportError, match=r"batch 7: the graph answers \(2, 3\), wanted \(7, 3\)"):
        compare("features", np.ones((7, 3), np.float32), np.ones((2, 3), np.float32))


def test_check_graph__tensor_in_another_file(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    name = model.graph.initializer[0].name
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(ExportError, match=f"'{name}' in another file"):
        check_graph(model)


def test_check_graph__not_valid(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    model.graph.node[3].input[0] = "nowhere"
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_graph(model)
