"""The exported encoder behind three steps: prepare (host), run (device), finish (host).

In: (S, S, 3) uint8 pixels of the bundle's input contract. Out: features (n, F) and embeddings
(n, D) of unit length. Which execution provider really runs is asked of the session, not assumed.
"""

import ctypes.util
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from trainer.representation.bundle import FP32, Bundle, BundleError
from trainer.representation.preprocess import InputContract

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
UNIT_TOLERANCE = 1e-3  # what bundles guarantee of their gallery's rows, asked of the encoder too
FP16, INT8 = "fp16", "int8"
# An image's embedding may not depend on its neighbours in the batch by more than this. Half numbers
# may be added in another order in another batch.
BATCH_TOLERANCE = {FP32: 1e-3, INT8: 1e-3, FP16: 5e-3}
# What `auto` takes first, and whether a provider can run a precision at all. onnxruntime's CUDA
# provider has no kernel for integer convolutions (each would go to the CPU and back), and its CPU
# provider turns every half number to float32 and back, which is slower than float32.
RUNS_ON = {CPU: (INT8, FP32), CUDA: (FP16, FP32)}
_ERRORS_ONLY = 3  # onnxruntime's log severity


class Embedded(NamedTuple):
    """What the encoder says of n images."""

    embeddings: NDArray[np.float32]  # (n, D) unit length
    features: NDArray[np.float32]  # (n, F)


class EmbedderError(Exception):
    """The encoder cannot be used; the message says what was found and what to do."""


class Embedder(Protocol):
    """What the service needs of an encoder; tests pass their own."""

    model_id: str
    contract: InputContract
    embedding_dim: int
    feature_dim: int
    execution_provider: str
    precision: str  # fp32, fp16 or int8

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """n images (S, S, 3) -> one batch (n, S, S, 3)."""
        ...

    def run(self, batch: NDArray[np.uint8]) -> Embedded:
        """Run the network; may be called by several threads at a time."""
        ...

    def finish(self, raw: Embedded) -> Embedded:
        """Check what came out."""
        ...


class OnnxEmbedder:
    """A bundle's encoder in onnxruntime.

    On the CPU one session with one thread is called by several threads at a time: each call then
    runs on its caller's core, which serves as well as one session per core and holds the weights
    once. Spinning is off: waiting threads would burn the cores that decode.

    Args:
        bundle: an opened bundle.
        execution_provider: "auto", "cpu" or "cuda".
        precision: which of the bundle's graphs; "auto" takes the fastest that it carries and that
            the provider in use runs: fp16 on CUDA, int8 on the CPU, else fp32.

    Raises:
        EmbedderError: the graph does not load, is not what the manifest says, fails its self-test;
            "cuda" was asked for and is not in use; the bundle does not carry the precision that was
            asked for, or the provider in use does not run it. Nothing else is taken instead.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        execution_provider: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["fp32", "fp16", "int8", "auto"] = "fp32",
    ) -> None:
        self.model_id = bundle.model_id
        self.contract = bundle.contract
        self.embedding_dim = bundle.embedding_dim
        self.feature_dim = bundle.feature_dim
        providers = _wanted_providers(execution_provider)
        self.precision, self._session = _open(bundle, precision, providers)
        self.execution_provider: str = self._session.get_providers()[0]
        if execution_provider == "cuda" and self.execution_provider != CUDA:
            raise EmbedderError(
                f"execution_provider = cuda was asked for, but {self.execution_provider} is in "
                "use: CUDA or cuDNN does not load here. Mend the driver, or choose auto or cpu."
            )
        if precision == "auto" and self.execution_provider != providers[0]:  # it does not load
            self.precision, self._session = _open(bundle, precision, [self.execution_provider])
        _check_runs(self.precision, self.execution_provider)
        self._self_test()

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """n images (S, S, 3) uint8 -> one batch (n, S, S, 3)."""
        return np.stack(images)

    def run(self, batch: NDArray[np.uint8]) -> Embedded:
        """(n, S, S, 3) uint8 -> features and embeddings as the network gives them."""
        features, embeddings = self._session.run(["features", "embedding"], {"images": batch})
        return Embedded(embeddings, features)

    def finish(self, raw: Embedded) -> Embedded:
        """Refuse what is not finite: such a vector would poison every search.

        Raises:
            EmbedderError: NaN or infinity came out.
        """
        if not (np.isfinite(raw.embeddings).all() and np.isfinite(raw.features).all()):
            raise EmbedderError("the encoder gave values that are not finite")
        return raw

    def _self_test(self) -> None:
        """Run two fixed pictures together and alone before the service calls itself ready."""
        side = self.contract.size_px
        ramp = np.arange(side * side * 3, dtype=np.uint32).reshape(side, side, 3)
        images = [(ramp % 256).astype(np.uint8), (ramp * 7 % 251).astype(np.uint8)]
        try:
            both = self.finish(self.run(self.prepare(images)))
            alone = self.finish(self.run(self.prepare(images[:1])))
        except _ORT_ERRORS as error:
            raise EmbedderError(f"the encoder fails its self-test: {error}") from error
        wanted = ((2, self.embedding_dim), (2, self.feature_dim))
        if (both.embeddings.shape, both.features.shape) != wanted:
            raise EmbedderError(
                f"the encoder gives embedding {both.embeddings.shape} and features "
                f"{both.features.shape}, the manifest says {wanted[0]} and {wanted[1]}"
            )
        lengths = np.linalg.norm(both.embeddings, axis=1)
        if not np.allclose(lengths, 1, atol=UNIT_TOLERANCE):
            raise EmbedderError(f"the encoder's embeddings have lengths {lengths}, wanted 1")
        if not np.allclose(
            both.embeddings[:1], alone.embeddings, atol=BATCH_TOLERANCE[self.precision]
        ):
            raise EmbedderError("the encoder gives one image other embeddings in another batch")


def _open(bundle: Bundle, asked: str, providers: list[str]) -> tuple[str, Any]:
    """The precision that is taken, and a session on its graph."""
    precision = asked
    if asked == "auto":
        precision = next(p for p in RUNS_ON[providers[0]] if p in bundle.precisions)
    try:
        name = bundle.encoder_file(precision)
    except BundleError as error:
        raise EmbedderError(
            f"precision = {precision} was asked for, but {error}. Choose one of "
            f"{', '.join(bundle.precisions)}, or auto"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    try:
        graph = bundle.encoder_onnx(precision)
        return precision, onnxruntime.InferenceSession(graph, options, providers=providers)
    except _ORT_ERRORS as error:
        raise EmbedderError(f"{bundle.directory / name} does not load: {error}") from error


def _check_runs(precision: str, provider: str) -> None:
    if precision in RUNS_ON.get(provider, (FP32,)):
        return
    why, instead = {
        FP16: ("which would turn every half number to float32 and back, slower than fp32", INT8),
        INT8: ("which has no integer convolutions: each would go to the CPU and back", FP16),
    }[precision]
    provider_too = ", or execution_provider = cpu" if precision == INT8 else ""
    raise EmbedderError(
        f"precision = {precision} was asked for, but {provider} is in use, {why}. Choose "
        f"precision = {instead}, fp32 or auto{provider_too}"
    )


def _wanted_providers(choice: str) -> list[str]:
    if choice == "cpu" or CUDA not in onnxruntime.get_available_providers():
        return [CPU]
    # Asking for CUDA where there is no driver prints errors and then falls to the CPU anyway.
    if choice == "auto" and ctypes.util.find_library("cuda") is None:
        return [CPU]
    onnxruntime.preload_dlls()
    return [CUDA, CPU]


# onnxruntime's own exceptions derive straight from Exception or RuntimeError: no common root.
_ORT_ERRORS: tuple[type[BaseException], ...] = (
    RuntimeError,
    ValueError,
    *(
        error
        for error in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
)
