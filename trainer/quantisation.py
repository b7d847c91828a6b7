"""How the exported graph becomes one that computes in 8-bit integers, for CPUs.

In: the float32 graph and real images as the service will see them. Out: a graph with the same input
and outputs whose convolutions, residual additions and pooling are written between QuantizeLinear
and DequantizeLinear nodes (QDQ), which onnxruntime runs as integer arithmetic.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from trainer.encoder import PIXEL_MEAN, PIXEL_STD
from trainer.onnx_graph import INPUT, ExportError, check_graph, open_session, strip

# The head stays float32: it is a hundredth of the work, and quantised it costs more accuracy than
# all convolutions together. So does the mean over places, of which onnxruntime has no integer form
# here, and the step to unit length.
QUANTISED_OPERATORS = ("Conv", "Relu", "Add", "MaxPool")

# Weights take 7 of the 8 bits. CPUs without VNNI add two products of 8 bits in 16, which overflow
# with all 8: the graph would answer otherwise there, and what is measured here would not hold.
SEVEN_BIT_WEIGHTS = True

_EXTREMES = ("ReduceMin", "ReduceMax")
_SHIFT = "make_pixels_shifted"  # an addition, but not of activations


class Range(NamedTuple):
    """The least and the largest value that a tensor took."""

    low: float
    high: float


def int8_graph(content: bytes, batches: Iterable[NDArray[np.uint8]]) -> bytes:
    """Quantise a serialised graph; equal graphs and images give equal bytes.

    Weights: int8, symmetric, a scale for each output channel. Activations: uint8, one scale and
    zero point for each tensor, from the least to the largest value that the images caused.

    Args:
        batches: uint8 (B, S, S, 3) each; at least one. Memory for one at a time.

    Raises:
        ExportError: there is no convolution, or a value on the way was not finite.
    """
    model = onnx.load_from_string(content)
    _scale_pixels_by_rows(model.graph)
    ranges = activation_ranges(model, batches)
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    quantiser = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        True,  # a scale for each channel of the weights
        SEVEN_BIT_WEIGHTS,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, data),
        [],  # nodes: all of the kinds below,
        [_SHIFT],  # ... except what scales the pixels
        list(QUANTISED_OPERATORS),
        {"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    quantised = quantiser.model.model
    strip(quantised)
    check_graph(quantised)
    serialised: bytes = quantised.SerializeToString()
    return serialised


def activation_ranges(
    model: onnx.ModelProto, batches: Iterable[NDArray[np.uint8]]
) -> dict[str, Range]:
    """Run the float32 graph and note the range of every activation that will be quantised.

    Raises:
        ExportError: no images, no such activation, or a value that is not finite.
    """
    measured = copy.deepcopy(model)
    names = _activations(measured.graph)
    if not names:
        raise ExportError("the graph has no convolution that could be quantised")
    for name in names:
        for operator in _EXTREMES:
            output = f"{name}_{operator}"
            measured.graph.node.append(helper.make_node(operator, [name], [output], keepdims=0))
            measured.graph.output.append(
                helper.make_tensor_value_info(output, TensorProto.FLOAT, [])
            )
    session = open_session(measured.SerializeToString())
    lows, highs = ([f"{name}_{operator}" for name in names] for operator in _EXTREMES)
    found: list[NDArray[np.float32]] = []
    for images in batches:
        found.append(np.array(session.run([*lows, *highs], {INPUT: images})).reshape(2, -1))
    if not found:
        raise ExportError("there are no images to calibrate with")
    low = np.min([values[0] for values in found], axis=0)  # (number of names,); NaN stays NaN
    high = np.max([values[1] for values in found], axis=0)
    for name, bounds in zip(names, zip(low, high, strict=True), strict=True):
        if not np.isfinite(bounds).all():
            raise ExportError(f"{name} takes values that are not finite on the training images")
    return {
        name: Range(float(least), float(most))
        for name, least, most in zip(names, low, high, strict=True)
    }


def _activations(graph: onnx.GraphProto) -> list[str]:
    """Inputs and outputs of the nodes that will be quantised, each once, in their order."""
    weights = {tensor.name for tensor in graph.initializer}
    names: dict[str, None] = {}
    for node in graph.node:
        if node.op_type in QUANTISED_OPERATORS and node.name != _SHIFT:
            names |= dict.fromkeys(name for name in (*node.input, *node.output) if name)
    return [name for name in names if name not in weights]


def _scale_pixels_by_rows(graph: onnx.GraphProto) -> None:
    """Rewrite what lies before the first convolution as one factor and one shift a pixel row.

    It is the same function of the pixels, a x + b for each channel. onnxruntime computes an integer
    convolution with the channels last; it would move the scaling there too, where a factor for each
    of three neighbouring numbers costs a sixth of a ResNet-18's time (measured). A row of S x 3
    numbers at a time does not.
    """
    first = next((node for node in graph.node if node.op_type == "Conv"), None)
    if first is None:
        raise ExportError("the graph has no convolution that could be quantised")
    side = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    mean, std = np.array(PIXEL_MEAN), np.array(PIXEL_STD)
    constants = {
        "pixels_rows_shape": np.array([0, side, side * 3]),  # 0: the batch as it comes
        "pixels_image_shape": np.array([0, side, side, 3]),
        "pixels_factors": np.tile(1 / (255 * std), side).astype(np.float32),
        "pixels_shifts": np.tile(-mean / std, side).astype(np.float32),
    }
    steps = [
        helper.make_node("Reshape", [INPUT, "pixels_rows_shape"], ["pixels_rows"]),
        helper.make_node("Cast", ["pixels_rows"], ["pixels_real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels_real", "pixels_factors"], ["pixels_scaled"]),
        helper.make_node("Add", ["pixels_scaled", "pixels_shifts"], ["pixels_shifted"]),
        helper.make_node("Reshape", ["pixels_shifted", "pixels_image_shape"], ["pixels_image"]),
        helper.make_node("Transpose", ["pixels_image"], ["pixels"], perm=[0, 3, 1, 2]),
    ]
    for step in steps:
        step.name = f"make_{step.output[0]}"
    first.input[0] = "pixels"

    nodes = [*steps, *graph.node]
    needed = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(copy.deepcopy(node))
    graph.ClearField("node")
    graph.node.extend(reversed(kept))
    weights = [copy.deepcopy(tensor) for tensor in graph.initializer if tensor.name in needed]
    weights += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph.ClearField("initializer")
    graph.initializer.extend(weights)
