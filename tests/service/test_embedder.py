"""service.embedder: the bundle's graph, checked before anyone relies on it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from service import embedder as embedder_module
from service.embedder import CPU, CUDA, Embedded, EmbedderError, OnnxEmbedder
from trainer.representation.bundle import Bundle, Variant, open_bundle


class Replaced(Bundle):
    """A bundle whose graph is another one."""

    graph: bytes = b""

    def encoder_onnx(self, precision: str = "fp32") -> bytes:
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


def test_precision__picks_the_graph(varied_directory: Path) -> None:
    bundle = open_bundle(varied_directory)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    rows = {}
    for asked, taken in (("fp32", "fp32"), ("int8", "int8"), ("auto", "int8")):
        embedder = OnnxEmbedder(bundle, execution_provider="cpu", precision=asked)  # type: ignore[arg-type]
        assert embedder.precision == taken
        rows[asked] = embedder.run(pixels).embeddings
        session = onnxruntime.InferenceSession(bundle.encoder_onnx(taken))
        (wanted,) = session.run(["embedding"], {"images": pixels})
        np.testing.assert_allclose(rows[asked], wanted, atol=1e-6)
    assert np.abs(rows["fp32"] - rows["int8"]).max() > 0.01  # the two graphs differ
    assert OnnxEmbedder(bundle, execution_provider="cpu").precision == "fp32"  # unless asked


def test_precision__auto_of_a_bundle_without_variants_is_fp32(bundle: Bundle) -> None:
    embedder = OnnxEmbedder(bundle, execution_provider="cpu", precision="auto")
    assert (embedder.precision, embedder.execution_provider) == ("fp32", CPU)


def test_precision__that_the_bundle_lacks_is_refused_with_the_reason(
    bundle: Bundle, varied_directory: Path
) -> None:
    with pytest.raises(
        EmbedderError,
        match=r"precision = int8 was asked for, but .* has no int8 graph: it was exported without "
        r"one\. Choose one of fp32, or auto",
    ):
        OnnxEmbedder(bundle, execution_provider="cpu", precision="int8")
    with pytest.raises(
        EmbedderError, match=r"smallest cosine to fp32 is 0\.9\. Choose one of fp32, int8, or auto"
    ):
        OnnxEmbedder(open_bundle(varied_directory), execution_provider="cpu", precision="fp16")


def test_precision__fp16_on_the_cpu_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, bundle: Bundle
) -> None:
    half = {"fp16": Variant(bundle.encoder_onnx(), None, {})}
    opened = open_bundle(make_bundle(tmp_path / "bundle", variants=half))
    with pytest.raises(
        EmbedderError,
        match=r"precision = fp16 was asked for, but CPUExecutionProvider is in use.*slower than "
        r"fp32\. Choose precision = int8, fp32 or auto",
    ):
        OnnxEmbedder(opened, execution_provider="cpu", precision="fp16")
    assert OnnxEmbedder(opened, execution_provider="cpu", precision="auto").precision == "fp32"


class SessionOnCuda:
    """Stands for a session that CUDA really runs; its numbers are the CPU's."""

    opened: ClassVar[list[bytes]] = []

    def __init__(self, graph: bytes, options: Any, providers: list[str]) -> None:
        self.opened.append(graph)
        self.providers = providers
        self.session = CPU_SESSION(graph, providers=[CPU])

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, *arguments: Any) -> Any:
        return self.session.run(*arguments)


CPU_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which CUDA loads."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", SessionOnCuda)
    monkeypatch.setattr(embedder_module, "_wanted_providers", lambda choice: [CUDA, CPU])


@pytest.mark.usefixtures("cuda")
def test_precision__on_cuda_auto_takes_fp16_and_never_int8(
    make_bundle: Callable[..., Path], tmp_path: Path, bundle: Bundle, varied_directory: Path
) -> None:
    half = {"fp16": Variant(bundle.encoder_onnx(), None, {})}
    opened = open_bundle(make_bundle(tmp_path / "bundle", seed=5, variants=half))
    embedder = OnnxEmbedder(opened, precision="auto")
    assert (embedder.precision, embedder.execution_provider) == ("fp16", CUDA)
    assert SessionOnCuda.opened[-1] == opened.encoder_onnx("fp16")
    with_int8 = open_bundle(varied_directory)
    assert OnnxEmbedder(with_int8, precision="auto").precision == "fp32"
    with pytest.raises(
        EmbedderError,
        match=r"precision = int8 was asked for, but CUDAExecutionProvider is in use.*no integer "
        r"convolutions.*fp16, fp32 or auto, or execution_provider = cpu",
    ):
        OnnxEmbedder(with_int8, precision="int8")


def test_precision__auto_where_cuda_does_not_load_after_all(
    monkeypatch: pytest.MonkeyPatch, varied_directory: Path
) -> None:
    """onnxruntime leaves a provider out that it cannot load: what fits the CPU is taken then."""

    class Fallen(SessionOnCuda):
        def get_providers(self) -> list[str]:
            return [CPU]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    monkeypatch.setattr(embedder_module, "_wanted_providers", lambda choice: [CUDA, CPU])
    embedder = OnnxEmbedder(open_bundle(varied_directory), precision="auto")
    assert (embedder.precision, embedder.execution_provider) == ("int8", CPU)
    with pytest.raises(EmbedderError, match="cuda was asked for, but CPUExecutionProvider"):
        OnnxEmbedder(open_bundle(varied_directory), execution_provider="cuda", precision="auto")


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
