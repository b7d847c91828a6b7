"""The int8 and fp16 graphs of a trained encoder: speed, cosine and kNN accuracy against float32.

    python tests/benchmarks/export_variants.py --run runs/photos --data photos [--test more_photos]

`--run` is the folder of a run (its newest checkpoint is exported), `--data` what it was trained on.
Goals: int8 >= 2.8x the images/s of fp32, smallest cosine >= 0.99, kNN drop <= 0.5 points; our
runner >= 0.98x a bare session, fp32 >= 1.2x torch (1.8x at batch 1). One thread, the graphs in
turns, medians of images per second of CPU time: other work on the machine counts little.
`--choices` also measures what was not chosen for int8.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.embedder import OnnxEmbedder
from trainer import quantisation
from trainer.checkpoint import ENCODER, checkpoints
from trainer.config import EncoderConfig, ExportConfig
from trainer.datasets import ImageSource, open_source, split
from trainer.encoder import Encoder, build_encoder
from trainer.export import export_bundle
from trainer.onnx_graph import OnnxGraph, open_session, published_copy
from trainer.quantisation import int8_graph
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import InputContract
from trainer.representation.protocols import KNN_K, knn_accuracy
from trainer.variants import DRAW, cpu_name, measure, measure_speed

BATCHES = (1, 8, 32)
CALIBRATION_IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", help="labelled images to ask; else those held out")
    parser.add_argument("--most", type=int, default=4000, help="training images in the gallery")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="while embedding, not while timing")
    parser.add_argument("--choices", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, train, test, contract = load(options.run, options.data, options.most)
    if options.test is not None:
        test = open_source(options.test)
    print(f"{cpu_name()}; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    print(f"{len(train)} training images, {len(test)} test images, {contract.size_px} px")

    def prepared(positions: Any) -> NDArray[np.uint8]:
        return train.prepared(positions, contract)

    with tempfile.TemporaryDirectory() as folder:
        seconds = {}
        for name, variants in (("fp32 only", ()), ("with fp16 and int8", ("fp16", "int8"))):
            begun = time.process_time()
            export_bundle(
                encoder,
                Path(folder) / "bundle",
                ids=train.ids,
                prepared=prepared,
                contract=contract,
                recipe={},
                training={},
                config=ExportConfig(variants=variants, calibration_images=CALIBRATION_IMAGES),
                labels=train.labels,
                say=print,
            )
            seconds[name] = time.process_time() - begun
        print(
            "export, CPU time: "
            + ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
        )
        bundle = open_bundle(Path(folder) / "bundle")
        graphs = {name: bundle.encoder_onnx(name) for name in bundle.precisions}
        print("bytes: " + ", ".join(f"{name} {len(graph):,}" for name, graph in graphs.items()))
        embeddings = bundle.gallery().embeddings
        embedder = OnnxEmbedder(bundle, execution_provider="cpu")

    drawn = np.random.default_rng([DRAW, len(train)]).permutation(len(train))
    measuring = drawn[CALIBRATION_IMAGES:]
    exact = OnnxGraph(graphs["fp32"], open_session(graphs["fp32"]))
    asked = test.prepared(range(len(test)), contract) if len(test) else None

    def asked_accuracy(graph: OnnxGraph) -> float:
        assert asked is not None
        assert train.labels is not None
        assert test.labels is not None
        return knn_accuracy(
            np.concatenate([graph.run(block)["embedding"] for block in blocks(asked)]),
            test.labels,
            embeddings,
            train.labels,
            k=min(KNN_K, len(train)),
        )

    of_fp32 = asked_accuracy(exact) if asked is not None else 0.0

    def judge(name: str, content: bytes) -> None:
        graph = OnnxGraph(content, open_session(content))
        figures = measure(graph.run, prepared, measuring, embeddings, train.labels)
        cosine, knn = figures["cosine"], figures["knn"]
        line = f"{name:<34} cosine min {cosine['min']:.5f} mean {cosine['mean']:.5f}"
        if knn is not None:
            line += f"; training kNN {knn['fp32']:.4f} -> {knn['variant']:.4f}"
            line += f", drop {100 * knn['drop']:+.2f}"
        if asked is not None:
            accuracy = asked_accuracy(graph)
            line += (
                f"; test {of_fp32:.4f} -> {accuracy:.4f}, drop {100 * (of_fp32 - accuracy):+.2f}"
            )
        print(f"{line} ({figures['images']} images)", flush=True)

    if "int8" in graphs:
        judge("int8", graphs["int8"])
    if options.choices:
        compare_choices(graphs["fp32"], prepared, drawn, judge)

    torch.set_num_threads(1)
    sessions = {name: alone(graph) for name, graph in graphs.items() if name != "fp16"}
    network = published_copy(encoder)
    for batch in BATCHES:
        images = prepared(measuring[:batch].tolist())
        speeds = measure_speed(
            {**sessions, "our runner": Runner(embedder), "torch": Torch(network)},
            images,
            rounds=options.rounds,
            clock=time.process_time,
        )["images_per_s"]
        ratios = ", ".join(
            f"{name} {speed:.1f}/s = {speed / speeds['fp32']:.2f}x"
            for name, speed in speeds.items()
        )
        print(f"batch {batch}: {ratios}", flush=True)


class Runner:
    """The service's path around the same float32 session."""

    def __init__(self, embedder: OnnxEmbedder) -> None:
        self.embedder = embedder

    def run(self, _: None, given: dict[str, NDArray[np.uint8]]) -> Any:
        return self.embedder.finish(self.embedder.run(self.embedder.prepare(list(given["images"]))))


class Torch:
    """The network in torch, eager."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    @torch.inference_mode()
    def run(self, _: None, given: dict[str, NDArray[np.uint8]]) -> Any:
        return self.network(torch.from_numpy(given["images"]))


def alone(content: bytes) -> Any:
    """A bare session with the service's options."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compare_choices(
    content: bytes,
    prepared: Callable[[Any], NDArray[np.uint8]],
    drawn: NDArray[np.int64],
    judge: Callable[[str, bytes], None],
) -> None:
    """Other numbers of images, all eight bits of the weights, more and fewer operators."""

    def images(count: int) -> Iterator[NDArray[np.uint8]]:
        return (prepared(drawn[i : i + 8].tolist()) for i in range(0, count, 8))

    for count in (32, 64, 128, 256):
        judge(f"{count} calibration images", int8_graph(content, images(count)))
    for name, setting, value in (
        ("weights of 8 bits", "SEVEN_BIT_WEIGHTS", False),
        ("head quantised too", "QUANTISED_OPERATORS", ("Conv", "Relu", "Add", "MaxPool", "Gemm")),
        ("additions float32", "QUANTISED_OPERATORS", ("Conv", "Relu", "MaxPool")),
    ):
        before = getattr(quantisation, setting)
        setattr(quantisation, setting, value)
        judge(name, int8_graph(content, images(CALIBRATION_IMAGES)))
        setattr(quantisation, setting, before)


def blocks(images: NDArray[np.uint8], size: int = 32) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def load(
    run: Path, data: str, most: int
) -> tuple[Encoder, ImageSource, ImageSource, InputContract]:
    """The newest checkpoint's encoder, and its images divided as the run divided them."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    encoder = build_encoder(EncoderConfig(**recipe["encoder"]))
    newest = checkpoints(run / "checkpoints")[0]
    print(f"{newest.name} of {run.name}: {recipe['encoder']}")
    encoder.load_state_dict(safetensors.torch.load_file(newest / ENCODER))
    source = open_source(data)
    train, held_out = split(
        source.labels, len(source), holdout=recipe["data"]["holdout"], seed=recipe["seed"]
    )
    some = np.sort(np.random.default_rng(0).permutation(train)[:most])
    contract = InputContract(
        size_px=recipe["encoder"]["image_size_px"], crop_fraction=recipe["data"]["crop_fraction"]
    )
    return encoder, source.subset(some), source.subset(held_out), contract


if __name__ == "__main__":
    main()
