"""The whole training step against the backbone's own: ResNet-18 at 32 px, B = 128, N = 50,000.

    python tests/benchmarks/train_step.py                      # bf16, channels last: <= 1.04
    python tests/benchmarks/train_step.py --precision fp32

One thread, interleaved: the ratio of the medians, and the median of the ratios of neighbours. The
backbone's step is forward, backward and SGD of the same encoder with the sum of its embeddings as
the loss; the step of InvP adds the search of the bank, both losses, and the updates of bank and
graph. The views are measured apart.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.augment import Views, apply_views, draw_views
from trainer.config import load_recipe
from trainer.distributed import ALONE
from trainer.host_memory import keep_freed_memory
from trainer.schedule import view_generator
from trainer.session import build
from trainer.step import TrainingStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as trainer.run does
    words = [f"batch_size={options.batch}", f"precision={options.precision}", "device=cpu"]
    recipe = load_recipe("cifar10", [*words, f"encoder.backbone={options.backbone}"])
    cpu = torch.device("cpu")
    ours, bare = (build(recipe, options.images, cpu) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    ours.bank.neighbours.random_(0, options.images, generator=generator)
    step = TrainingStep(recipe, ours, ours.encoder, ALONE, lambda: 0)
    pixels = torch.randint(0, 256, (options.batch, 32, 32, 3), generator=generator).byte()
    sizes = torch.full((options.batch, 2), 32)
    views: Views = draw_views(recipe.augment, sizes, view_generator(0, 1, 1))
    seen = apply_views(pixels, views, size_px=32)
    ours.encoder.train()
    bare.encoder.train()
    draw = np.random.default_rng(0)

    def run_views() -> None:
        drawn = draw_views(recipe.augment, sizes, view_generator(0, 1, int(draw.integers(2**31))))
        apply_views(pixels, drawn, size_px=32)

    def run_invp() -> None:
        indices = draw.permutation(options.images)[: options.batch]
        step.learn(torch.from_numpy(indices), seen, recipe.loss.invariance_weight).tolist()

    def run_backbone() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            embeddings = bare.encoder(seen).embedding
        bare.optimiser.zero_grad(set_to_none=True)
        embeddings.sum().backward()
        bare.optimiser.step()

    variants: dict[str, Callable[[], None]] = {
        "backbone forward, backward, SGD": run_backbone,
        "InvP step without views": run_invp,
        "views": run_views,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            start = time.process_time()  # of one thread: what others do beside it counts less
            run()
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    base, invp, augment = seconds.values()
    print(
        f"{options.backbone}, 32 px, {options.precision}, channels last, one thread, torch "
        f"{torch.__version__}; N = {options.images:,}, B = {options.batch}, medians of "
        f"{options.repeats}"
    )
    for name, values in seconds.items():
        print(
            f"{name:<34} {statistics.median(values) * 1e3:8.1f} ms"
            f"   ({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})"
        )
    ratio = statistics.median(invp) / statistics.median(base)
    print(f"InvP step / backbone, medians        {ratio:.3f}")
    pairs = [after / before for before, after in zip(base, invp, strict=True)]
    print(f"InvP step / backbone, pairs          {statistics.median(pairs):.3f}")
    whole = [(a + c) / b for a, b, c in zip(invp, base, augment, strict=True)]
    print(f"with views / backbone, pairs         {statistics.median(whole):.3f}")


if __name__ == "__main__":
    main()
