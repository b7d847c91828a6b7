"""What the parts of Invariance Propagation add: short runs on 10,000 images of CIFAR-10, on a CPU.

    python tests/benchmarks/ablation.py run --arms instance paper --seeds 0 1 --output runs.jsonl
    python tests/benchmarks/ablation.py report runs.jsonl         # the table, mean and spread

One core, bf16, a small residual network (1.1 M parameters), one view an image, 50 epochs: 7 to 8
minutes a run where nothing else runs. All arms share seeds, data, order, views and initial weights.
Accuracy: weighted kNN (K = 200, temperature 0.07) of the 10,000 test images against the 10,000
training images, on the embedding, at the LAST epoch; nothing is chosen by it.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.cifar10_pack import PACK, Labelled, balanced, read_pack
from trainer import objective as objective_module
from trainer.augment import apply_views, collate, draw_views
from trainer.config import Recipe, load_recipe
from trainer.encoder import Encoder, embed_images
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, Objective, objective
from trainer.representation.neighbours import KnnGraph, exact_graph
from trainer.representation.propagation import propagate_paths
from trainer.representation.protocols import knn_accuracy
from trainer.schedule import epoch_batches, invariance_weight, learning_rate, view_generator

ROOT = Path(__file__).parents[2]
WIDTHS = (48, 96, 192)
EVALUATED_TOGETHER = 250
TEST_IMAGES, TRAINING_IMAGES, CLASSES = 10_000, 10_000, 10
# The cifar10 recipe, but for what the size of the trial asks for.
SETTINGS = (
    "epochs=50",
    "optim.schedule=cosine",  # the whole of it: the rate ends near 0
    "precision=bf16",
    "encoder.normalise=true",  # small sets collapse without it
    "loss.num_background=3333",  # a third of the bank
    "loss.warmup_epochs=7",
)


@dataclass(frozen=True)
class Arm:
    """What differs from the paper's method at these settings."""

    title: str
    weight: float = 0.6  # lambda
    mode: str = "paper"
    positives: str = "hard"
    steps: int = 3
    neighbours: int = 4  # k
    mutual: bool = False  # only edges whose end has the other among its own neighbours
    refresh: bool = False  # the graph is made anew from the bank before every epoch
    views: int = 1  # of each image of a batch of as many embeddings; epochs are fewer accordingly
    each: bool = False  # every positive has a term of its own instead of one sum
    by_hop: bool = False  # ... with weight 1 / hop


PAPER = Arm("InvP, paper mode (hard, l = 3)")
ARMS = {
    "instance": Arm("instance discrimination only (lambda 0)", weight=0.0),
    "paper": PAPER,
    "official": replace(PAPER, title="InvP, official mode", mode="official"),
    "easy": replace(PAPER, title="InvP, easy positives", positives="easy"),
    "steps1": replace(PAPER, title="InvP, l = 1", steps=1),
    "steps2": replace(PAPER, title="InvP, l = 2", steps=2),
    "mutual": replace(PAPER, title="InvP, mutual graph of k = 8", mutual=True, neighbours=8),
    # Settings that might beat the paper's at equal cost.
    "refresh": replace(PAPER, title="graph made anew every epoch", refresh=True),
    "each": replace(PAPER, title="a term for each positive", each=True),
    "by_hop": replace(PAPER, title="a term for each positive, by 1 / hop", each=True, by_hop=True),
    "two_views": replace(PAPER, title="two views, half the epochs", views=2),
    "weight1": replace(PAPER, title="lambda 1.2", weight=1.2),
    "refresh_each": replace(
        PAPER, title="a term for each positive, graph anew every epoch", each=True, refresh=True
    ),
}


class Residual(nn.Module):
    """x + two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*convolution(width, width), nn.ReLU(inplace=True))
        self.second = nn.Sequential(*convolution(width, width))

    def forward(self, values: Tensor) -> Tensor:
        return torch.relu(values + self.second(self.first(values)))


def convolution(before: int, after: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    layer = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return layer, nn.BatchNorm2d(after)


def small_residual_encoder(recipe: Recipe) -> Encoder:
    """Three stages of stride 2 with a residual block each, the head of the recipe."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [*convolution(before, width, 2), nn.ReLU(inplace=True), Residual(width)]
        before = width
    dim = recipe.encoder.dim
    head = [nn.Linear(before, before), nn.ReLU(), nn.Linear(before, dim)]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Encoder(
        backbone,
        nn.Sequential(*head, nn.BatchNorm1d(dim, affine=False)),
        feature_dim=before,
        dim=dim,
        size_px=recipe.encoder.image_size_px,
    )


@dataclass(frozen=True)
class Data:
    train: Labelled
    test: Labelled


def train(arm: Arm, seed: int, data: Data, epochs: int) -> dict[str, Any]:
    """One run; its figures by epoch."""
    recipe = load_recipe("cifar10", [*SETTINGS, f"seed={seed}", f"epochs={epochs}"])
    warmup = round(recipe.loss.warmup_epochs * epochs / load_recipe("cifar10", SETTINGS).epochs)
    config = LossConfig(
        temperature=recipe.loss.temperature,
        num_background=recipe.loss.num_background,
        steps=arm.steps,
        num_positives=recipe.loss.num_positives,
        mode=arm.mode,  # type: ignore[arg-type]
        positives=arm.positives,  # type: ignore[arg-type]
    )
    torch.manual_seed(seed)
    encoder = small_residual_encoder(recipe).to(memory_format=torch.channels_last)
    bank = MemoryBank(len(data.train.labels), recipe.encoder.dim, arm.neighbours)
    optimiser = torch.optim.SGD(
        encoder.parameters(),
        lr=recipe.optim.lr,
        momentum=recipe.optim.momentum,
        weight_decay=recipe.optim.weight_decay,
    )
    labels = torch.from_numpy(data.train.labels)
    lines: list[dict[str, float]] = [{"epoch": 0, "knn": measure(encoder, data)}]
    began = time.monotonic()
    passes = epochs // arm.views  # equal numbers of views
    for epoch in range(1, passes + 1):
        rate = learning_rate(recipe.optim, epoch, passes)
        for group in optimiser.param_groups:
            group["lr"] = rate
        weight = invariance_weight(arm.weight, epoch, warmup // arm.views)
        if arm.refresh and weight:
            fresh_graph = exact_graph(bank.embeddings, arm.neighbours).neighbours
            bank.neighbours.copy_(torch.from_numpy(fresh_graph))
        encoder.train()
        order = epoch_batches(seed, epoch, len(labels), recipe.batch_size // arm.views)
        sums = np.zeros(5)
        for step, images in enumerate(order, 1):
            block = collate([data.train.images[i] for i in images])
            generator = view_generator(seed, epoch, step)
            pixels = torch.cat(
                [
                    apply_views(
                        block.pixels,
                        draw_views(recipe.augment, block.sizes, generator),
                        size_px=recipe.encoder.image_size_px,
                    )
                    for _ in range(arm.views)
                ]
            )
            own = torch.from_numpy(images)
            indices = own.repeat(arm.views)
            with torch.autocast("cpu", torch.bfloat16):
                embeddings = encoder(pixels.to(memory_format=torch.channels_last)).embedding
            found, invariance = losses_of(arm, bank, indices, embeddings, config)
            loss = found.instance + weight * invariance if weight else found.instance
            if not math.isfinite(value := float(loss.detach())):
                raise SystemExit(f"{arm.title}: the loss is {value} in epoch {epoch}")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            fresh = embeddings.detach().view(arm.views, len(own), -1).mean(dim=0)
            bank.update(own, nn.functional.normalize(fresh, dim=1))
            bank.refresh_neighbours(indices, found.nearest)
            there = found.reached >= 0
            same = (labels[found.reached] == labels[indices][:, None]) & there
            chosen = found.hard_positives >= 0
            right = (labels[found.hard_positives] == labels[indices][:, None]) & chosen
            sums += (
                float(found.instance.detach()),
                float(invariance.detach()),
                float(there.sum() / len(indices)),
                float(same.sum() / there.sum().clamp(min=1)),
                float(right.sum() / chosen.sum().clamp(min=1)),
            )
        names = ("instance", "invariance", "reached", "purity", "purity_chosen")
        line = {"epoch": epoch * arm.views, **dict(zip(names, sums / len(order), strict=True))}
        if epoch == passes or (epoch * arm.views) % 20 == 0:
            line["knn"] = measure(encoder, data)
        lines.append(line)
        print(json.dumps({"arm": arm.title, "seed": seed, **line}), file=sys.stderr, flush=True)
    return {"lines": lines, "seconds": time.monotonic() - began}


def losses_of(
    arm: Arm, bank: MemoryBank, indices: Tensor, embeddings: Tensor, config: LossConfig
) -> tuple[Objective, Tensor]:
    """The objective, and the invariance loss as the arm has it."""
    seen: list[Tensor] = []
    plain = objective_module.losses.invariance_loss

    def listening(
        positives: Tensor, mask: Tensor, background: Tensor, temperature: float
    ) -> Tensor:
        seen.extend((positives, mask, background))
        return plain(positives, mask, background, temperature)

    graph = MutualGraph(bank) if arm.mutual else bank
    objective_module.losses.invariance_loss = listening
    try:
        found = objective(graph, indices, embeddings, config)  # type: ignore[arg-type]
    finally:
        objective_module.losses.invariance_loss = plain
    if not arm.each:
        return found, found.invariance
    positives, mask, background = seen
    weights = mask.float()
    if arm.by_hop:
        paths = propagate_paths(bank.graph(), indices, config.steps)
        same = found.hard_positives[:, :, None] == paths.ids[:, None, :]
        hops = torch.where(same, paths.steps[:, None, :], 0).amax(dim=2)
        weights = weights / hops.clamp(min=1)
    return found, each_positive(positives, weights, background, config.temperature)


def each_positive(
    positives: Tensor, weights: Tensor, background: Tensor, temperature: float
) -> Tensor:
    """Mean of -log P(p | p and background) over the positives with their weights."""
    competing = (background / temperature).logsumexp(dim=1, keepdim=True)  # (B, 1)
    competing = competing.clamp(min=-1e4)  # an empty background
    own = positives / temperature
    terms = nn.functional.softplus(competing - own)
    share = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (terms * share).sum(dim=1).mean()


class MutualGraph:
    """A bank that shows only the edges that go both ways."""

    def __init__(self, bank: MemoryBank) -> None:
        self.embeddings, self.num_neighbours = bank.embeddings, bank.num_neighbours
        ids = bank.neighbours  # (N, K)
        back = ids[ids.clamp(min=0)]  # (N, K, K) the neighbours of each neighbour
        both = (back == torch.arange(len(ids))[:, None, None]).any(dim=2)
        self.neighbours = torch.where(both & (ids >= 0), ids, -1)

    def graph(self) -> KnnGraph:
        return KnnGraph(self.neighbours, None)


def measure(encoder: Encoder, data: Data) -> float:
    """Weighted kNN accuracy of the test images against the training images."""

    def embedded(images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
        count = EVALUATED_TOGETHER
        blocks = (images[first : first + count] for first in range(0, len(images), count))
        return embed_images(encoder, blocks, "cpu")[1]

    return knn_accuracy(
        embedded(data.test.images),
        data.test.labels,
        embedded(data.train.images),
        data.train.labels,
        k=min(200, len(data.train.labels)),
    )


def report(path: Path) -> str:
    """A Markdown table of the runs, one row an arm."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        "| arm | seeds | kNN, last epoch | mean | spread | against instance only | reached "
        "| purity of reached / chosen | minutes a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    floor = {seed: run["lines"][-1]["knn"] for seed, run in by_arm.get("instance", {}).items()}
    for name in [name for name in ARMS if name in by_arm]:
        seeds = dict(sorted(by_arm[name].items()))
        values = [run["lines"][-1]["knn"] for run in seeds.values()]
        paired = [
            run["lines"][-1]["knn"] - floor[seed] for seed, run in seeds.items() if seed in floor
        ]
        last = [run["lines"][-1] for run in seeds.values()]

        def mean(key: str, lines: list[dict[str, float]] = last) -> float:
            return statistics.mean(line[key] for line in lines)

        gain = f"{100 * statistics.mean(paired):+.2f} points" if paired else "-"
        rows.append(
            f"| {ARMS[name].title} | {', '.join(map(str, seeds))} "
            f"| {', '.join(f'{value:.4f}' for value in values)} | {statistics.mean(values):.4f} "
            f"| {max(values) - min(values):.4f} | {gain} "
            f"| {mean('reached'):.1f} | {mean('purity'):.2f} / {mean('purity_chosen'):.2f} "
            f"| {statistics.mean(run['seconds'] for run in seeds.values()) / 60:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = parser.add_subparsers(dest="word", required=True)
    running = words.add_parser("run")
    running.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    running.add_argument("--epochs", type=int, default=50)
    running.add_argument("--images", type=int, default=TRAINING_IMAGES)
    running.add_argument("--test-images", type=int, default=TEST_IMAGES)
    running.add_argument("--pack", type=Path, default=PACK)
    running.add_argument("--output", type=Path, required=True, help="a line is added for each run")
    reporting = words.add_parser("report")
    reporting.add_argument("runs", type=Path)
    options = parser.parse_args()
    if options.word == "report":
        print(report(options.runs))
        return
    torch.set_num_threads(1)
    data = Data(
        balanced(read_pack("train", options.pack), options.images // CLASSES, seed=0),
        balanced(read_pack("test", options.pack), options.test_images // CLASSES, seed=0),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for seed in options.seeds:
        for name in options.arms:
            figures = train(ARMS[name], seed, data, options.epochs)
            line = {"arm": name, "seed": seed, "commit": commit, **figures}
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
