"""How a trained network becomes an ONNX graph that answers as the network does.

In: an encoder, real images. Out: one self-contained graph, uint8 images in, features and embeddings
out, compared with the network; or `ExportError`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.encoder import Encoder, pixels_from_uint8
from trainer.quiet_onnxruntime import onnxruntime

# The opset that torch's exporter writes without converting; every onnxruntime since 1.14 reads it.
OPSET = 18

# Odd, even and single batches: a batch frozen while tracing, or folded away, fails one of them.
PARITY_BATCH_SIZES = (1, 2, 7)
PARITY_MAX_ABS = 1e-4
PARITY_MIN_COSINE = 0.9999

CPU = "CPUExecutionProvider"
INPUT = "images"
OUTPUTS = ("features", "embedding")

Prepared = Callable[[Sequence[int]], NDArray[np.uint8]]


class ExportError(Exception):
    """An encoder that may not be published; the message names the part and the figures."""


class OnnxGraph(NamedTuple):
    """A serialised ONNX graph and a session that runs it."""

    content: bytes
    session: Any  # onnxruntime.InferenceSession

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Answer `features` and `embedding` for images uint8 (B, S, S, 3)."""
        return dict(zip(OUTPUTS, self.session.run(list(OUTPUTS), {INPUT: images}), strict=True))


class PublishedEncoder(nn.Module):
    """The encoder as the graph offers it: uint8 images in, a plain pair out."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(pixels_from_uint8(images))
        return output.features, output.embedding


def published_copy(encoder: Encoder) -> PublishedEncoder:
    """Copy an encoder to the CPU in float32 and evaluation mode, ready for export.

    Raises:
        ExportError: a weight or statistic is not finite; the message names it.
    """
    copied = copy.deepcopy(encoder).to("cpu", torch.float32)
    copied.to(memory_format=torch.contiguous_format)
    for name, tensor in copied.state_dict().items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ExportError(
                f"{name} holds {bad} of {tensor.numel()} values that are not finite: the training "
                "went wrong before this; export an earlier checkpoint"
            )
    return PublishedEncoder(copied).eval()


def build_graph(network: PublishedEncoder) -> OnnxGraph:
    """Trace the network into ONNX with a dynamic batch.

    Equal networks give equal bytes: nothing of the exporter's own notes is kept, of which stack
    traces name this machine's paths.

    Raises:
        ExportError: the result is not valid ONNX or not in one file.
    """
    side = network.encoder.image_size_px
    # Two images: a batch of one would be taken for a constant and frozen into the graph.
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    with warnings.catch_warnings():
        # torch 2.11 and 2.12 warn of their own use of a name that they deprecated.
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # it is None only for the exporter that dynamo=True replaces
    model = program.model_proto
    strip(model)
    onnx.helper.set_model_props(
        model,
        {
            "product": "invprop",
            "input": f"{INPUT}: uint8 RGB (batch, {side}, {side}, 3); normalised inside",
            "image_size_px": str(side),
            "feature_dim": str(network.encoder.feature_dim),
            "embedding_dim": str(network.encoder.embedding_dim),
            "embedding_l2_normalised": "true",
            "opset": str(OPSET),
        },
    )
    check_graph(model)
    # No field of the format is a map, so equal graphs have equal bytes.
    content = model.SerializeToString()
    return OnnxGraph(content, open_session(content))


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a graph that is not valid ONNX or that keeps tensors in other files.

    Raises:
        ExportError: naming the tensor, or with the checker's reason.
    """
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ExportError(
                f"the graph keeps {tensor.name!r} in another file; a bundle's graph is one file"
            )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes of its own work, and shapes that can be inferred again."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def open_session(
    content: bytes, *, threads: int | None = None, provider: str = CPU, optimised: bool = True
) -> Any:
    """Open a graph in onnxruntime.

    Args:
        threads: of the CPU; None takes torch's number, one budget for the whole process.
        provider: where it runs; what it cannot run there runs on the CPU, so ask the session.
        optimised: False computes the nodes as they are written, each by itself.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    providers = [CPU] if provider == CPU else [provider, CPU]
    return onnxruntime.InferenceSession(content, options, providers=providers)


def measure_parity(
    network: PublishedEncoder, graph: OnnxGraph, prepared: Prepared, count: int
) -> dict[str, Any]:
    """Compare network and graph at each of PARITY_BATCH_SIZES on real images.

    Args:
        prepared: gives the images; asked for positions spread over 0..count-1, some of them twice
            where there are fewer than the batches take.
        count: N, >= 1.

    Returns:
        the manifest's `parity`: batch sizes, how many different images, tolerance, and `outputs`
        {output: {batch size: {max_abs, min_cosine}}}.

    Raises:
        ExportError: naming output, batch and figures of a miss, or values that are not finite.
    """
    wanted = sum(PARITY_BATCH_SIZES)
    positions = [step * max(count // wanted, 1) % count for step in range(wanted)]
    outputs: dict[str, dict[str, dict[str, float]]] = {name: {} for name in OUTPUTS}
    start = 0
    for size in PARITY_BATCH_SIZES:
        images = prepared(positions[start : start + size])
        start += size
        with torch.inference_mode():
            expected = dict(zip(OUTPUTS, network(torch.tensor(images)), strict=True))
        answered = graph.run(images)
        for name in OUTPUTS:
            outputs[name][str(size)] = compare(name, expected[name].numpy(), answered[name])
    return {
        "batch_sizes": list(PARITY_BATCH_SIZES),
        "images": len(set(positions)),
        "provider": CPU,
        "tolerance": {"max_abs": PARITY_MAX_ABS, "min_cosine": PARITY_MIN_COSINE},
        "outputs": outputs,
    }


def compare(
    name: str, expected: NDArray[np.float32], answered: NDArray[np.float32]
) -> dict[str, float]:
    """Measure how far the graph's (B, W) answer is from the network's, both float32.

    Returns:
        `max_abs`, the largest difference, and `min_cosine`, the smallest over the B rows.

    Raises:
        ExportError: another shape, a value that is not finite, or a miss of the tolerance.
    """
    what = f"{name} at batch {len(expected)}"
    if answered.shape != expected.shape:
        raise ExportError(f"{what}: the graph answers {answered.shape}, wanted {expected.shape}")
    for source, values in (("network", expected), ("graph", answered)):
        if not np.isfinite(values).all():
            raise ExportError(f"{what}: the {source} answers values that are not finite")
    one, other = expected.astype(np.float64), answered.astype(np.float64)
    max_abs = float(np.abs(one - other).max())
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    # Rows of zeros have no direction; max_abs alone judges them.
    cosine = np.divide((one * other).sum(axis=1), lengths, out=np.ones(len(one)), where=lengths > 0)
    min_cosine = float(cosine.min())
    if max_abs > PARITY_MAX_ABS or min_cosine < PARITY_MIN_COSINE:
        raise ExportError(
            f"{what}: graph and network differ by {max_abs:.3g} (at most {PARITY_MAX_ABS:g}), "
            f"cosine {min_cosine:.6f} (at least {PARITY_MIN_COSINE}); nothing was written"
        )
    return {"max_abs": max_abs, "min_cosine": min_cosine}
