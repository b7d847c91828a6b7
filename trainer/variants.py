"""The encoder's graph in other precisions: made, measured on real images, let through or left out.

In: the float32 graph, the training images, what the float32 graph says of them. Out: the variants
of a bundle with their figures, and how fast they ran. A variant that misses a floor is left out
with its figures; it never ends the export.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import ExportConfig
from trainer.half_precision import half_graph, rounded_graph
from trainer.onnx_graph import CPU, ExportError, OnnxGraph, Prepared, open_session
from trainer.quantisation import int8_graph
from trainer.representation.bundle import FP32, Variant
from trainer.representation.protocols import KNN_K, knn_accuracy

Precision = Literal["fp16", "int8"]
CUDA = "CUDAExecutionProvider"

# What a variant must reach. Embeddings of all precisions meet in one gallery, so they have to be
# the same vectors for every purpose of a search.
MIN_COSINE = 0.99  # to float32, of every image
MAX_KNN_DROP = 0.005  # share of images, asked with the variant in the float32 gallery
MAX_LENGTH_ERROR = 1e-3  # what the service accepts

# A drop of half a point is five of so many images; of fewer, chance alone makes one.
KNN_JUDGED_FROM = 1000
MEASURED_IMAGES = 1000
# Half numbers on a CPU are slower than float32, and turn a vector by less than a thousandth.
MEASURED_IMAGES_HALF_ON_CPU = 250
TOGETHER = 32  # images in one run
TOGETHER_CALIBRATING = 8  # every activation of these is kept: 350 MB for a ResNet-50 at 224 px

SPEED_BATCH = 8
SPEED_ROUNDS = 5
SPEED_LEAST_S = 0.08  # of each graph in each round
DRAW = 0  # seed of the images that calibrate and measure


class Made(NamedTuple):
    """The variants of one graph."""

    variants: dict[str, Variant]
    speed: dict[str, Any]  # JSON values, see `measure_speed`


def make_variants(
    graph: OnnxGraph,
    config: ExportConfig,
    *,
    prepared: Prepared,
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64] | None = None,
    provider: str = CPU,
    say: Callable[[str], object] = lambda line: None,
) -> Made:
    """Make and measure the graph in each precision of `config.variants`.

    Everything but the speed is a function of the arguments, on one machine with one number of
    threads.

    Args:
        graph: float32, its session on the CPU.
        prepared: gives the training images of some of the positions 0..N-1.
        embeddings: (N, D), what `graph` says of all of them.
        labels: (N,) classes for the kNN figures; None where unknown.
        provider: where fp16 is measured; int8 always is on the CPU.
        say: told one line of each variant.
    """
    if not config.variants:
        return Made({}, {})
    count = len(embeddings)
    drawn = np.random.default_rng([DRAW, count]).permutation(count)
    # Never more than half, so that some are left to measure with.
    calibrating = drawn[: max(1, min(config.calibration_images, count // 2))]
    measuring = drawn[len(calibrating) :] if count > 1 else drawn
    variants: dict[str, Variant] = {}
    sessions: dict[str, Mapping[str, Any]] = {CPU: {FP32: open_session(graph.content, threads=1)}}
    untimed: dict[str, str] = {}
    for precision in config.variants:
        if precision == "int8":
            variant = _make_int8(graph, prepared, calibrating, measuring, embeddings, labels)
        else:
            variant = _make_fp16(graph, prepared, measuring, embeddings, labels, provider)
        variants[precision] = variant
        say(told(precision, variant))
        if variant.graph is None:
            untimed[precision] = "left out"
        elif precision == "int8":
            one_thread = open_session(variant.graph, threads=1)
            sessions[CPU] = {**sessions[CPU], precision: one_thread}
        elif variant.figures["provider"] == CUDA:
            both = {FP32: graph.content, precision: variant.graph}
            sessions[CUDA] = {name: open_session(c, provider=CUDA) for name, c in both.items()}
        else:
            untimed[precision] = (
                "the export ran on a CPU, which turns each half number to float32 and back"
                if provider == CPU
                else f"onnxruntime does not load {provider} here, though torch does"
            )
    images = prepared([int(i) for i in np.resize(measuring, SPEED_BATCH)])
    timed = [
        {"provider": where, "threads": 1 if where == CPU else None, **measure_speed(there, images)}
        for where, there in sessions.items()
    ]
    return Made(variants, {"cpu": cpu_name(), "runs": timed, "not_timed": untimed})


def measure(
    run: Callable[[NDArray[np.uint8]], Mapping[str, NDArray[np.float32]]],
    prepared: Prepared,
    positions: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """Compare a graph with the float32 one on some of the training images.

    Args:
        run: the graph.
        positions: (Q,) which images.
        embeddings, labels: as `make_variants`.

    Returns:
        `images` Q; `cosine` {min, mean}; `length_error`, the largest distance of a length from 1;
        `knn` None without labels, else top-1 accuracies {fp32, variant, drop, k}: each image asked
        in the float32 gallery of all others. Values that are not finite are None.
    """
    answered = np.concatenate(
        [run(prepared([int(i) for i in block]))["embedding"] for block in _blocks(positions)]
    )
    expected = embeddings[positions]
    lengths = np.linalg.norm(answered.astype(np.float64), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (answered.astype(np.float64) * expected).sum(axis=1) / lengths
    knn = None
    finite = bool(np.isfinite(answered).all())
    if labels is not None and finite and len(embeddings) > 1:
        k = min(KNN_K, len(embeddings) - 1)
        of_float32, of_variant = (
            knn_accuracy(queries, labels[positions], embeddings, labels, k=k, exclude=positions)
            for queries in (expected, answered)
        )
        knn = {
            "fp32": of_float32,
            "variant": of_variant,
            "drop": of_float32 - of_variant,
            "k": k,
        }
    return {
        "images": len(positions),
        "cosine": {"min": _finite(cosines.min()), "mean": _finite(cosines.mean())},
        "length_error": _finite(np.abs(lengths - 1).max()),
        "knn": knn,
    }


def missed_floor(figures: Mapping[str, Any]) -> str | None:
    """Why a variant with these figures of `measure` is not good enough; None where it is."""
    least, error, knn = figures["cosine"]["min"], figures["length_error"], figures["knn"]
    if least is None or error is None:
        return "it answers values that are not finite"
    if least < MIN_COSINE:
        return f"its smallest cosine to fp32 is {least:.4f}, wanted {MIN_COSINE} at least"
    if error > MAX_LENGTH_ERROR:
        return f"a length is {error:.2g} off 1, wanted {MAX_LENGTH_ERROR:g} at most"
    if knn is not None and figures["images"] >= KNN_JUDGED_FROM and knn["drop"] > MAX_KNN_DROP:
        return (
            f"its kNN accuracy is {knn['variant']:.4f} where fp32 has {knn['fp32']:.4f}: "
            f"{100 * knn['drop']:.2f} points less, wanted {100 * MAX_KNN_DROP} at most"
        )
    return None


def measure_speed(
    sessions: Mapping[str, Any],
    images: NDArray[np.uint8],
    *,
    rounds: int = SPEED_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time graphs in turns: `batch` and `images_per_s` by precision, medians of the rounds."""
    for session in sessions.values():
        session.run(None, {"images": images})
    speeds: dict[str, list[float]] = {precision: [] for precision in sessions}
    for _ in range(rounds):
        for precision, session in sessions.items():
            runs, begun = 0, clock()
            while (passed := clock() - begun) < SPEED_LEAST_S:
                session.run(None, {"images": images})
                runs += 1
            speeds[precision].append(runs * len(images) / passed)
    medians = {precision: statistics.median(values) for precision, values in speeds.items()}
    return {"batch": len(images), "images_per_s": medians}


def told(precision: str, variant: Variant) -> str:
    """One line on a variant, for the log."""
    if variant.graph is None:
        return f"WARNING: no {precision} graph in the bundle: {variant.reason}"
    cosine, knn = variant.figures["cosine"], variant.figures["knn"]
    dropped = "" if knn is None else f", kNN accuracy {knn['fp32']:.4f} -> {knn['variant']:.4f}"
    return (
        f"{precision} graph: cosine to fp32 at least {cosine['min']:.5f}, mean "
        f"{cosine['mean']:.5f}{dropped}, on {variant.figures['images']} images"
    )


def cpu_name() -> str | None:
    """What Linux calls this machine's processor; None where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _make_int8(
    graph: OnnxGraph,
    prepared: Prepared,
    calibrating: NDArray[np.int64],
    measuring: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
) -> Variant:
    blocks = (prepared([int(i) for i in b]) for b in _blocks(calibrating, TOGETHER_CALIBRATING))
    facts = {"calibration": {"images": len(calibrating), "method": "least and largest value"}}
    try:
        content = int8_graph(graph.content, blocks)
    except ExportError as error:
        return Variant(None, str(error), facts)
    quantised = OnnxGraph(content, open_session(content))
    positions = measuring[:MEASURED_IMAGES]
    figures = measure(quantised.run, prepared, positions, embeddings, labels)
    apart = len(np.intersect1d(calibrating, positions)) == 0
    return _judged(content, {**facts, "provider": CPU, **figures, "held_apart": apart})


def _make_fp16(
    graph: OnnxGraph,
    prepared: Prepared,
    measuring: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    provider: str,
) -> Variant:
    content = half_graph(graph.content)
    session, count = open_session(content, provider=provider), MEASURED_IMAGES
    if session.get_providers()[0] == CPU:  # asked for, or all that there is
        session, count = open_session(rounded_graph(graph.content)), MEASURED_IMAGES_HALF_ON_CPU
    run = OnnxGraph(content, session).run
    figures = measure(run, prepared, measuring[:count], embeddings, labels)
    # Nothing was calibrated.
    facts = {"provider": session.get_providers()[0], **figures, "held_apart": True}
    return _judged(content, facts)


def _judged(content: bytes, figures: dict[str, Any]) -> Variant:
    reason = missed_floor(figures)
    return Variant(content if reason is None else None, reason, figures)


def _blocks(positions: NDArray[np.int64], size: int = TOGETHER) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
