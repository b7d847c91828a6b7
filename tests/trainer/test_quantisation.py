import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainer import quantisation
from trainer.encoder import Encoder
from trainer.onnx_graph import (
    ExportError,
    OnnxGraph,
    build_graph,
    open_session,
    published_copy,
)
from trainer.quantisation import activation_ranges, int8_graph

REPOSITORY = Path(quantisation.__file__).parents[1]
IMAGES = np.repeat(np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None], 3, 3)
CALIBRATION = [IMAGES[:40], IMAGES[40:60]]


class Residual(nn.Module):
    """The block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.outer = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(pixels)) + pixels
        return torch.relu(out)


def residual_encoder() -> Encoder:
    """Convolution, pooling, one residual block, head; its statistics are those of real images."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False))
    encoder = Encoder(backbone, head, feature_dim=8, dim=6, size_px=8).train()
    with torch.no_grad():
        for _ in range(30):
            encoder(torch.tensor(IMAGES[:500]).permute(0, 3, 1, 2) / 255)
    return encoder


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    return build_graph(published_copy(residual_encoder()))


@pytest.fixture(scope="module")
def quantised(graph: OnnxGraph) -> OnnxGraph:
    content = int8_graph(graph.content, CALIBRATION)
    return OnnxGraph(content, open_session(content, threads=1))


def constants(content: bytes) -> dict[str, np.ndarray]:
    graph = onnx.load_from_string(content).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_int8__answers_nearly_as_the_graph(graph: OnnxGraph, quantised: OnnxGraph) -> None:
    held_apart = IMAGES[60:400]
    expected, answered = graph.run(held_apart), quantised.run(held_apart)
    cosines = (expected["embedding"] * answered["embedding"]).sum(axis=1)
    assert cosines.min() > 0.98  # a random network of 8 channels; trained ones reach 0.9993
    assert cosines.mean() > 0.998
    assert cosines.mean() < 1 - 1e-6  # it is another arithmetic
    np.testing.assert_allclose(np.linalg.norm(answered["embedding"], axis=1), 1, atol=1e-6)
    assert answered["features"].dtype == answered["embedding"].dtype == np.float32
    assert quantised.run(held_apart[:1])["embedding"].shape == (1, 6)


def test_int8__convolutions_stand_between_quantised_activations_and_weights(
    quantised: OnnxGraph,
) -> None:
    graph = onnx.load_from_string(quantised.content).graph
    maker = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    inner = [node for node in graph.node if node.op_type in ("Conv", "Add", "MaxPool")]
    inner = [node for node in inner if node.name != quantisation._SHIFT]
    assert sorted(node.op_type for node in inner) == ["Add", "Conv", "Conv", "Conv", "MaxPool"]
    for node in inner:
        assert {maker[name].op_type for name in node.input} == {"DequantizeLinear"}
        assert readers[node.output[0]].op_type == "QuantizeLinear"
    # The head and the step to unit length are as they were; batch norm is inside the convolutions.
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Gemm") == 1
    assert "BatchNormalization" not in kinds
    assert maker[next(n for n in graph.node if n.op_type == "Gemm").input[0]].op_type == "Reshape"


def test_int8__weights_are_int8_with_a_scale_for_each_channel(
    graph: OnnxGraph, quantised: OnnxGraph
) -> None:
    values, exact = constants(quantised.content), constants(graph.content)
    weights = {n: v for n, v in values.items() if v.dtype == np.int8 and v.ndim == 4}
    assert sorted(v.shape for v in weights.values()) == [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3)]
    for name, weight in weights.items():
        scale = values[name.replace("_quantized", "_scale")]
        assert scale.shape == (8,)
        assert len(set(scale.tolist())) == 8
        assert not values[name.replace("_quantized", "_zero_point")].any()  # symmetric
        scaled = weight.astype(np.float32) * scale[:, None, None, None]
        error = np.abs(scaled - exact[name.removesuffix("_quantized")])
        assert (error <= 0.501 * scale[:, None, None, None]).all()  # to the nearest
        # Seven bits: two products with a uint8 fit into 16 bits on every CPU.
        assert np.abs(weight.astype(int)).max() in (63, 64)
        assert 2 * 255 * int(np.abs(weight.astype(int)).max()) < 2**15
    activations = [
        tensor
        for tensor in onnx.load_from_string(quantised.content).graph.initializer
        if tensor.data_type == TensorProto.UINT8
    ]
    assert len(activations) >= 5
    assert all(list(tensor.dims) == [] for tensor in activations)  # one zero point a tensor


def test_int8__really_runs_in_integers(quantised: OnnxGraph, tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(quantised.content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert kinds.count("QLinearAdd") == 1
    assert "Conv" not in kinds


def test_int8__pixels_are_scaled_as_in_the_graph(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    quantisation._scale_pixels_by_rows(model.graph)
    content = model.SerializeToString()
    rewritten = OnnxGraph(content, open_session(content)).run(IMAGES[:50])
    for name, expected in graph.run(IMAGES[:50]).items():
        np.testing.assert_allclose(rewritten[name], expected, atol=1e-5)


def test_int8__same_graph_and_images_same_bytes_in_any_process(
    graph: OnnxGraph, quantised: OnnxGraph, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert int8_graph(graph.content, CALIBRATION) == quantised.content
    assert capfd.readouterr() == ("", "")
    (tmp_path / "graph.onnx").write_bytes(graph.content)
    np.save(tmp_path / "images.npy", IMAGES[:60])
    program = (
        "import hashlib, sys, pathlib, numpy, trainer.quantisation as q\n"
        "images = numpy.load(sys.argv[2])\n"
        "content = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "content = q.int8_graph(content, [images[:40], images[40:]])\n"
        "print(hashlib.sha256(content).hexdigest())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "graph.onnx", tmp_path / "images.npy"],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == hashlib.sha256(quantised.content).hexdigest()


def test_int8__other_images_other_ranges(graph: OnnxGraph, quantised: OnnxGraph) -> None:
    assert int8_graph(graph.content, [IMAGES[:60] // 2]) != quantised.content


def test_ranges__are_the_least_and_largest_over_all_batches(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    ranges = activation_ranges(model, CALIBRATION)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (IMAGES[:60] / 255 - mean) / std
    assert ranges[first.input[0]] == pytest.approx((pixels.min(), pixels.max()), rel=1e-5)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    assert len(relus) == 3
    assert all(ranges[name].low == 0 < ranges[name].high for name in relus)
    alone = activation_ranges(model, [IMAGES[:40]])
    assert all(ranges[name].high >= alone[name].high for name in ranges)


def test_ranges__no_image_or_no_convolution(graph: OnnxGraph) -> None:
    with pytest.raises(ExportError, match="no images to calibrate with"):
        int8_graph(graph.content, [])
    model = onnx.load_from_string(graph.content)
    del model.graph.node[:]
    with pytest.raises(ExportError, match="no convolution"):
        int8_graph(model.SerializeToString(), CALIBRATION)


def test_ranges__values_that_are_not_finite(graph: OnnxGraph) -> None:
    model = onnx.load_from_string(graph.content)
    weight = next(t for t in model.graph.initializer if list(t.dims) == [8, 3, 3, 3])
    values = numpy_helper.to_array(weight).copy()
    values[0] = 3e38
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match="takes values that are not finite"):
        int8_graph(model.SerializeToString(), CALIBRATION)
