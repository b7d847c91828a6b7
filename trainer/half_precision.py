"""How the exported graph becomes one that computes in half precision, for GPUs.

In: the float32 graph. Out: a graph with the same input and outputs. From the first convolution to
the last layer of the head weights and activations are float16; the scaling of the pixels before it
and the step to unit length after it stay float32, and so do both outputs. For measuring without a
GPU there is the same arithmetic written in float32.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from trainer.onnx_graph import check_graph, strip

# What a backbone and a head are made of. Anything else (the unit-length step) takes float32.
HALF_OPERATORS = frozenset(
    {
        "Conv",
        "BatchNormalization",
        "Relu",
        "Add",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "Reshape",
        "Flatten",
        "Gemm",
    }
)
_HALF, _EXACT = "_half", "_exact"


def half_graph(content: bytes) -> bytes:
    """Turn the network inside a serialised graph to float16; equal graphs give equal bytes.

    Weights past 65504, the largest half, become infinite; whoever measures the graph sees it.
    """

    def write(node: NodeProto, kept_float: set[str]) -> list[NodeProto]:
        outputs = list(node.output)
        _rename(node, [f"{name}{_HALF}" for name in outputs])
        back = [_to_float(name) for name in outputs if name in kept_float]
        return [node, *back]

    return _rewrite(content, write, weights=np.float16)


def rounded_graph(content: bytes) -> bytes:
    """Write in float32 what `half_graph` computes where sums are kept in float32, as GPUs do.

    Every weight and the result of every layer is rounded to half. onnxruntime on a CPU would run
    `half_graph` itself in float32 too, but drop the roundings between its nodes.
    """

    def write(node: NodeProto, _: set[str]) -> list[NodeProto]:
        outputs = list(node.output)
        _rename(node, [f"{name}{_EXACT}" for name in outputs])
        casts = [_to_half(f"{name}{_EXACT}", f"{name}{_HALF}") for name in outputs]
        return [node, *casts, *(_to_float(name) for name in outputs)]

    return _rewrite(content, write, weights=np.float32)


def _rewrite(
    content: bytes, write: Callable[[NodeProto, set[str]], list[NodeProto]], *, weights: type
) -> bytes:
    """Replace the inner nodes of a graph by what `write` gives for each, in order.

    `write` is also told which of the values are read in float32 by an outer node or as an output.
    `weights` is the type that holds the halves: float16 computes with them, float32 imitates it.
    """
    model = onnx.load_from_string(content)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    entrance, inner = _inner_nodes(graph)
    computed = {name for node in inner for name in node.output}
    names = {node.name for node in inner}
    read_outside = {output.name for output in graph.output}
    for node in graph.node:
        if node.name not in names:
            read_outside.update(node.input)
    halves: dict[str, TensorProto] = {}
    imitates = weights is np.float32

    def inner_input(name: str) -> str:
        if name in constants:
            if constants[name].data_type != TensorProto.FLOAT:
                return name  # shapes and axes
            halves.setdefault(name, _rounded(constants[name], weights))
            return f"{name}{_HALF}"
        if imitates:
            return f"{name}{_EXACT}" if name == entrance else name
        return f"{name}{_HALF}"

    nodes: list[NodeProto] = []
    for original in graph.node:
        node = copy.deepcopy(original)
        if node.name not in names:
            nodes.append(node)
            continue
        if node.name == inner[0].name:
            nodes.append(_to_half(entrance, f"{entrance}{_HALF}"))
            if imitates:
                back = _cast(f"{entrance}{_HALF}", f"{entrance}{_EXACT}", TensorProto.FLOAT)
                nodes.append(back)
        inputs = [inner_input(name) for name in node.input]
        node.ClearField("input")
        node.input.extend(inputs)
        nodes += write(node, read_outside & computed)

    used = {name for node in nodes for name in node.input}
    kept = [*graph.initializer, *halves.values()]
    kept = [copy.deepcopy(tensor) for tensor in kept if tensor.name in used]
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    strip(model)
    check_graph(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def _inner_nodes(graph: onnx.GraphProto) -> tuple[str, list[NodeProto]]:
    """What the first convolution reads, and that node with all layers that follow from it."""
    first = next(index for index, node in enumerate(graph.node) if node.op_type == "Conv")
    inner = [graph.node[first]]
    computed = set(graph.node[first].output)
    for node in graph.node[first + 1 :]:
        if node.op_type in HALF_OPERATORS and computed.intersection(node.input):
            inner.append(node)
            computed.update(node.output)
    return graph.node[first].input[0], inner


def _rounded(tensor: TensorProto, kind: type) -> TensorProto:
    with np.errstate(over="ignore"):
        values: NDArray[Any] = numpy_helper.to_array(tensor).astype(np.float16).astype(kind)
    return numpy_helper.from_array(values, f"{tensor.name}{_HALF}")


def _rename(node: NodeProto, outputs: list[str]) -> None:
    node.ClearField("output")
    node.output.extend(outputs)


def _to_half(source: str, target: str) -> NodeProto:
    return _cast(source, target, TensorProto.FLOAT16)


def _to_float(name: str) -> NodeProto:
    return _cast(f"{name}{_HALF}", name, TensorProto.FLOAT)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)
