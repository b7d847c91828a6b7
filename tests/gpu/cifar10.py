"""CIFAR-10 by this trainer under lightly's benchmark protocol: ResNet-18, 200 epochs, kNN K = 200.

    python tests/gpu/cifar10.py --output DIR --limit-s 540      # again until it is done
    python tests/gpu/cifar10.py --output DIR --arms paper instance --seeds 0 1
    python tests/gpu/cifar10.py --output DIR --arms simclr          # lightly's own, if installed
    python tests/gpu/cifar10.py --output DIR --toy --device cpu # all of the script in seconds

Each arm and seed is a run of `python -m trainer.run cifar10-lightly` in DIR; past the limit it is
asked to stop, saves its state, and the next call goes on from there. A finished run is measured at
its LAST epoch on the 10,000 test images: weighted kNN (K = 200, temperature 0.1, as lightly) on the
features and on the embedding, and a logistic regression on the features. DIR/results.json holds all
of it, and a table is printed. The images are near-lossless JPEGs of CIFAR-10; figures say so.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.cifar10_pack import PACK, Labelled, balanced, read_pack
from trainer.config import load_recipe
from trainer.encoder import build_encoder, embed_images
from trainer.representation.bundle import WEIGHTS, open_bundle
from trainer.representation.protocols import knn_accuracy

ROOT = Path(__file__).parents[2]
RECIPE = "cifar10-lightly"
SIMCLR = "simclr"  # lightly's own, where the library is installed; see lightly_simclr.py
ARMS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "instance": ("loss.invariance_weight=0",),
    "easy": ("loss.positives=easy",),
    "official": ("loss.mode=official",),
}
# lightly's published table at batch 128, 200 epochs: kNN, the best of all epochs.
PUBLISHED = {"BYOL": 0.869, "SimCLR": 0.847, "MoCo": 0.838}
LIGHTLY_KNN_TEMPERATURE = 0.1
GRACE_S = 60  # for the state to be saved after the limit
EVALUATION_S = 60  # what measuring a finished run takes; no run is begun with less left
EMBEDDED_TOGETHER = 500
TOY = (
    "epochs=2",
    "batch_size=16",
    "loss.warmup_epochs=1",
    "loss.num_background=64",
    "encoder.backbone=small",
    "encoder.image_size_px=16",
    "monitor.max_images=100",
)


Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # features, embeddings


class Data(NamedTuple):
    train: Labelled
    test: Labelled


def main() -> None:
    options = parse()
    ends = time.monotonic() + options.limit_s
    data = Data(
        read_pack("train", options.pack),
        read_pack("test", options.pack),
    )
    if options.toy:
        data = Data(balanced(data.train, 20, 0), balanced(data.test, 10, 0))
    options.output.mkdir(parents=True, exist_ok=True)
    packed = options.output / "train.npz"
    if not packed.is_file():
        fresh = options.output / "new.npz"
        np.savez(fresh, images=data.train.images, labels=data.train.labels)
        fresh.replace(packed)
    results = read_results(options.output)
    unfinished = []
    for seed in options.seeds:
        for arm in options.arms:
            name = f"{arm}-{seed}"
            if name in results["runs"]:
                continue
            if ends - time.monotonic() < (0 if options.toy else EVALUATION_S):
                unfinished.append(name)
                continue
            folder = options.output / name
            if arm == SIMCLR:
                figures = train_simclr(folder, data, seed, options, ends)
            else:
                words = [f"seed={seed}", f"device={options.device}", *ARMS[arm]]
                words += [*(TOY if options.toy else ()), *options.overrides]
                ended = train(folder, packed, words, ends)
                figures = measure(folder, data, options) if ended else None
            if figures is None:
                unfinished.append(name)
                continue
            results["runs"][name] = {"arm": arm, "seed": seed, **figures}
            write_results(options.output, results)
    print(table(results))
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}. Give the same command again to go on")


def train(folder: Path, packed: Path, words: Sequence[str], ends: float) -> bool:
    """Begin a run, or go on with it, until it ends or the time is up; whether it ended."""
    began = folder.joinpath("recipe.yaml").is_file()
    command = [sys.executable, "-m", "trainer.run", RECIPE, *words]
    command += ["--data", str(packed), "--output", str(folder), *(["--resume"] if began else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with folder.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(GRACE_S)
            return False
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        said = folder.with_suffix(".log").read_text()
        raise SystemExit(f"{folder.name} ended with {code}:\n{said[-2000:]}")
    return True


def measure(folder: Path, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a finished run's last epoch."""
    bundle = open_bundle(folder / "bundle")
    recipe = load_recipe(folder / "recipe.yaml")
    encoder = build_encoder(recipe.encoder)
    encoder.load_state_dict(safetensors.torch.load(bundle.read(WEIGHTS)))
    device = device_of(options)
    side = recipe.encoder.image_size_px

    def embedded(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if images.shape[1] != side:  # the toy's
            images = images[:, :: images.shape[1] // side, :: images.shape[1] // side]
        count = EMBEDDED_TOGETHER
        blocks = (images[first : first + count] for first in range(0, len(images), count))
        return embed_images(encoder, blocks, device)

    train_side, test_side = embedded(data.train.images), embedded(data.test.images)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["epoch"] > 0]
    return {
        **accuracies(data, train_side, test_side),
        "epochs": trained[-1]["epoch"],
        "images_per_s": statistics.median(line["images_per_s"] for line in trained),
        "instance": trained[-1]["instance"],
        "invariance": trained[-1]["invariance"],
        "seconds": json.loads((folder / "report.json").read_text())["seconds"],
        "model_id": bundle.model_id,
        "commit": bundle.manifest["provenance"]["commit"],
        **machine(device),
    }


def train_simclr(
    folder: Path, data: Data, seed: int, options: argparse.Namespace, ends: float
) -> dict[str, Any] | None:
    """lightly's SimCLR for as many encoder passes: two views an image, so half the epochs."""
    # Here, because lightly is no dependency; it is asked for by name.
    from tests.gpu import lightly_simclr

    epochs = load_recipe(RECIPE, TOY if options.toy else options.overrides).epochs // 2
    device = device_of(options)
    workers = 0 if options.toy else len(os.sched_getaffinity(0))
    images = data.train.images
    if not lightly_simclr.train(
        folder, images, epochs=epochs, seed=seed, device=device, ends=ends, workers=workers
    ):
        return None
    state = lightly_simclr.open_state(folder, device, seed)
    train_side = lightly_simclr.embedded(state, images, device)
    test_side = lightly_simclr.embedded(state, data.test.images, device)
    return {
        **accuracies(data, train_side, test_side),
        "epochs": epochs,
        "images_per_s": epochs * len(images) * 2 / state.seconds,  # views, as everywhere
        "lightly": version("lightly"),
        **machine(device),
    }


def accuracies(data: Data, train_side: Pair, test_side: Pair) -> dict[str, float]:
    """kNN on features and on embeddings, logistic regression on features; pairs of the two."""

    def knn(gallery: NDArray[np.float32], queries: NDArray[np.float32]) -> float:
        return knn_accuracy(
            unit(queries),
            data.test.labels,
            unit(gallery),
            data.train.labels,
            k=min(200, len(gallery)),
            temperature=LIGHTLY_KNN_TEMPERATURE,
        )

    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    linear.fit(train_side[0], data.train.labels)
    return {
        "knn_features": knn(train_side[0], test_side[0]),
        "knn_embedding": knn(train_side[1], test_side[1]),
        "linear": float(linear.score(test_side[0], data.test.labels)),
    }


def device_of(options: argparse.Namespace) -> torch.device:
    asked = options.device
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def read_results(output: Path) -> dict[str, Any]:
    path = output / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {"runs": {}}


def write_results(output: Path, results: dict[str, Any]) -> None:
    fresh = output / "results.json.new"
    fresh.write_text(json.dumps(results, indent=1))
    fresh.replace(output / "results.json")


def table(results: dict[str, Any]) -> str:
    """Mean over seeds, every seed's own figure beside it."""
    rows = [
        "| arm | seeds | kNN features | kNN embedding | linear | images/s | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in (*ARMS, SIMCLR):
        runs = [run for run in results["runs"].values() if run["arm"] == arm]
        if not runs:
            continue
        cells = []
        for key in ("knn_features", "knn_embedding", "linear"):
            values = [run[key] for run in runs]
            own = ", ".join(f"{value:.4f}" for value in values)
            cells.append(f"{statistics.mean(values):.4f} ({own})")
        speed = statistics.median(run["images_per_s"] for run in runs)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        rows.append(
            f"| {arm} | {seeds} | {' | '.join(cells)} | {speed:.0f} | {runs[0]['epochs']} |"
        )
    published = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
    return "\n".join([*rows, f"lightly's table, best epoch, 200 epochs: {published}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, SIMCLR), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    parser.add_argument("--limit-s", type=float, default=540.0, help="of this call")
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--toy", action="store_true", help="200 images, two epochs")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
