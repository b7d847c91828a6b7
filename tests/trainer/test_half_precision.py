import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trainer.half_precision import half_graph, rounded_graph
from trainer.onnx_graph import OnnxGraph, open_session

SIDE = 6
GENERATOR = np.random.default_rng(0)
FILTERS = GENERATOR.standard_normal((4, 3, 3, 3)).astype(np.float32)
HEAD = GENERATOR.standard_normal((4, 5)).astype(np.float32)
IMAGES = GENERATOR.integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)


def small_graph(filters: np.ndarray = FILTERS) -> bytes:
    """A graph of the form of our export: pixels scaled, Conv, Relu, mean, head, unit length."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["turned"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["real", "largest"], ["pixels"]),
        helper.make_node("Conv", ["pixels", "filters"], ["filtered"]),
        helper.make_node("Relu", ["filtered"], ["active"]),
        helper.make_node("ReduceMean", ["active", "places"], ["features"], keepdims=0),
        helper.make_node("Gemm", ["features", "head"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1, p=2),
    ]
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    constants = {
        "largest": np.float32(255),
        "filters": filters,
        "places": np.array([2, 3]),
        "head": HEAD,
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 5]),
        ],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


def by_hand(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same network in numpy, every result of a layer rounded to half."""
    pixels = (images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)).astype(np.float16)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    filtered = np.einsum(
        "bchwij,ocij->bohw", windows.astype(np.float64), FILTERS.astype(np.float16).astype(float)
    )
    active = np.maximum(filtered.astype(np.float16), np.float16(0))
    features = active.astype(np.float64).mean(axis=(2, 3)).astype(np.float16)
    projected = features.astype(np.float64) @ HEAD.astype(np.float16).astype(np.float64)
    projected = projected.astype(np.float16).astype(np.float64)
    return features, projected / np.linalg.norm(projected, axis=1, keepdims=True)


def run(content: bytes) -> dict[str, np.ndarray]:
    return OnnxGraph(content, open_session(content, threads=1)).run(IMAGES)


def test_half__answers_as_the_network() -> None:
    """A CPU drops some of the roundings, so this graph is between both references."""
    answered = run(half_graph(small_graph()))
    features, embedding = by_hand(IMAGES)
    np.testing.assert_allclose(answered["features"], features.astype(np.float32), atol=5e-3)
    np.testing.assert_allclose(answered["embedding"], embedding, atol=1e-3)


def test_rounded__every_layer_is_rounded_even_where_the_graph_is_optimised() -> None:
    answered = run(rounded_graph(small_graph()))
    features, embedding = by_hand(IMAGES)
    halves = answered["features"].astype(np.float16)
    np.testing.assert_array_equal(answered["features"], halves.astype(np.float32))
    # One sum in another order may round to the neighbouring half; most do not.
    assert (halves == features).mean() > 0.9
    np.testing.assert_allclose(answered["features"], features.astype(np.float32), rtol=1e-3)
    np.testing.assert_allclose(answered["embedding"], embedding, atol=2e-4)
    assert np.abs(answered["features"] - run(small_graph())["features"]).max() > 1e-4


def test_rounded__holds_the_weights_of_the_half_graph() -> None:
    half, rounded = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(c).graph.initializer}
        for c in (half_graph(small_graph()), rounded_graph(small_graph()))
    )
    assert half.keys() == rounded.keys()
    for name in ("filters_half", "head_half"):
        assert rounded[name].dtype == np.float32
        np.testing.assert_array_equal(half[name].astype(np.float32), rounded[name])


def test_half__unit_length_is_of_float32() -> None:
    embedding = run(half_graph(small_graph()))["embedding"]
    assert embedding.dtype == np.float32
    # Half numbers would leave lengths 1e-4 off.
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)


def test_half__layers_are_float16_and_doors_are_not() -> None:
    model = onnx.load_from_string(half_graph(small_graph()))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {
        "largest": TensorProto.FLOAT,  # before the first convolution
        "places": TensorProto.INT64,
        "filters_half": TensorProto.FLOAT16,
        "head_half": TensorProto.FLOAT16,
    }
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert types["pixels"] == types["projected"] == TensorProto.FLOAT
    for name in ("filtered", "active", "features", "projected"):
        assert types[f"{name}_half"] == TensorProto.FLOAT16
    doors = (*model.graph.input, *model.graph.output)
    assert [v.type.tensor_type.elem_type for v in doors] == [
        TensorProto.UINT8,
        TensorProto.FLOAT,
        TensorProto.FLOAT,
    ]


def test_half__casts_stand_at_the_doors_only() -> None:
    model = onnx.load_from_string(half_graph(small_graph()))
    casts = [node.output[0] for node in model.graph.node if node.op_type == "Cast"]
    assert sorted(casts) == ["features", "pixels_half", "projected", "real"]


def test_half__same_graph_same_bytes() -> None:
    content = small_graph()
    assert half_graph(content) == half_graph(content)
    assert content == small_graph()
    assert half_graph(small_graph(FILTERS + 1)) != half_graph(content)


def test_half__a_weight_too_large_is_seen_in_the_answer() -> None:
    filters = FILTERS.copy()
    filters[0, 0, 0, 0] = 7e4
    assert not np.isfinite(run(half_graph(small_graph(filters)))["embedding"]).all()


@pytest.mark.parametrize("count", [1, 7])
def test_half__batch_stays_free(count: int) -> None:
    content = half_graph(small_graph())
    session = open_session(content, threads=1)
    assert session.run(["embedding"], {"images": IMAGES[:count]})[0].shape == (count, 5)
