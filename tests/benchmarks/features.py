"""Frozen features of packed images against the bare encoder on the same images: >= 0.95 of it.

    python tests/benchmarks/features.py                      # resnet18 at 32 px, 1,024 images
    python tests/benchmarks/features.py --backbone small --images 8192

The bare encoder gets the same batches as uint8 tensors that were prepared before, in inference
mode; the other side opens pictures, prepares, encodes, and collects rows. Interleaved, medians.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.config import EncoderConfig
from trainer.datasets.arrays import from_images
from trainer.decode_pool import DecodePool
from trainer.decoding import prepared_or_reasons
from trainer.encoder import build_encoder, pixels_from_uint8
from trainer.evaluation.features import EMBEDDED_TOGETHER, embed_all
from trainer.evaluation.layers import encode_with
from trainer.representation.preprocess import InputContract


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process: other work on the machine does not count, waiting neither."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=("small", "resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = EncoderConfig(
        backbone=options.backbone, image_size_px=options.size, head="mlp", dim=128, normalise=False
    )
    encoder = build_encoder(config).eval()
    shape = (options.images, options.size, options.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    source, contract = from_images(images, None), InputContract(size_px=options.size)

    def bare() -> None:
        with torch.inference_mode():
            for first in range(0, len(images), EMBEDDED_TOGETHER):
                batch = torch.from_numpy(images[first : first + EMBEDDED_TOGETHER])
                encoder(pixels_from_uint8(batch))

    def whole() -> None:
        with DecodePool(0) as pool:
            embed_all(
                (each for each in prepared_or_reasons(source, contract, pool)),
                encode_with(encoder, ("features", "embedding")),
                device=torch.device("cpu"),
            )

    bare(), whole()
    times: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(options.repeats):
        times["bare"].append(timed(bare))
        times["whole"].append(timed(whole))
    rates = {name: options.images / statistics.median(each) for name, each in times.items()}
    print(f"{options.backbone} {options.size} px, load {os.getloadavg()[0]:.1f}")
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s {[round(t, 3) for t in times[name]]}")
    ratios = [b / w for b, w in zip(times["bare"], times["whole"], strict=True)]
    print(
        f"share of the bare encoder {rates['whole'] / rates['bare']:.3f}, median of ratios "
        f"{statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
