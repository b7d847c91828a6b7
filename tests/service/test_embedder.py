"""service.embedder: the bundle's graph, checked before anyone relies on it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from service.embedder import CPU, Embedded, EmbedderError, OnnxEmbedder
from trainer.representation.bundle import Bundle


class Replaced(Bundle):
    """A bundle whose graph is another one."""

    graph: bytes = b""

    def encoder_onnx(self) -> bytes:
        return self.graph


def with_graph(bundle: Bundle, graph: bytes, **facts: int) -> Bundle:
    fields = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle)} | facts
    replaced = Replaced(**fields)
    object.__setattr__(replaced, "graph", graph)
    return replaced


def edited(bundle: Bundle, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(bundle.encoder_onnx())
    edit(model)
    return bytes(model.SerializeToString())


def test_embedder__gives_unit_embeddings_and_features(bundle: Bundle) -> None:
    embedder = OnnxEmbedder(bundle, execution_provider="cpu")
    images = [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 200, 255)]
    done = embedder.finish(embedder.run(embedder.prepare(images)))
    assert (done.embeddings.shape, done.features.shape) == ((3, 12), (3, 16))
    assert done.embeddings.dtype == done.features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(done.embeddings, axis=1), 1, atol=1e-6)
    assert embedder.execution_provider == CPU


def test_embedder__refuses_to_run_elsewhere_than_asked(bundle: Bundle) -> None:
    if "CUDA" in OnnxEmbedder(bundle, execution_provider="auto").execution_provider:
        pytest.skip("CUDA loads on this machine")
    assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    with pytest.raises(EmbedderError, match="cuda was asked for, but CPUExecutionProvider"):
        OnnxEmbedder(bundle, execution_provider="cuda")


def test_embedder__refuses_a_graph_that_does_not_load(bundle: Bundle) -> None:
    with pytest.raises(EmbedderError, match=r"encoder\.onnx does not load"):
        OnnxEmbedder(with_graph(bundle, b"no graph"), execution_provider="cpu")


def test_self_test__refuses_embeddings_of_another_length(bundle: Bundle) -> None:
    def skip_normalisation(model: onnx.ModelProto) -> None:
        model.graph.node[-1].CopyFrom(helper.make_node("Identity", ["projected"], ["embedding"]))

    graph = edited(bundle, skip_normalisation)
    with pytest.raises(EmbedderError, match="lengths"):
        OnnxEmbedder(with_graph(bundle, graph), execution_provider="cpu")


def test_self_test__refuses_other_dims_than_the_manifest_says(bundle: Bundle) -> None:
    wrong = with_graph(bundle, bundle.encoder_onnx(), feature_dim=17)
    with pytest.raises(
        EmbedderError, match=r"\(2, 16\), the manifest says \(2, 12\) and \(2, 17\)"
    ):
        OnnxEmbedder(wrong, execution_provider="cpu")


def test_self_test__refuses_embeddings_that_depend_on_the_batch(bundle: Bundle) -> None:
    def mix_the_batch(model: onnx.ModelProto) -> None:
        model.graph.node[3].input[0] = "mixed"
        mean = helper.make_node("ReduceMean", ["centred"], ["mixed_one"], axes=[0], keepdims=1)
        model.graph.node.insert(3, helper.make_node("Add", ["centred", "mixed_one"], ["mixed"]))
        model.graph.node.insert(3, mean)

    with pytest.raises(EmbedderError, match="in another batch"):
        OnnxEmbedder(with_graph(bundle, edited(bundle, mix_the_batch)), execution_provider="cpu")


def test_finish__refuses_what_is_not_finite(bundle: Bundle) -> None:
    embedder = OnnxEmbedder(bundle, execution_provider="cpu")
    rows = np.full((1, 12), np.nan, np.float32)
    with pytest.raises(EmbedderError, match="not finite"):
        embedder.finish(Embedded(rows, np.zeros((1, 16), np.float32)))
