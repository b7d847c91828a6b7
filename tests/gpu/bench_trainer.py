"""Training on one GPU: captured steps, the loss step, the backbones. One call, under ten minutes.

    python tests/gpu/bench_trainer.py --output bench.json          # on a GPU
    python tests/gpu/bench_trainer.py --output bench.json --toy --device cpu      # seconds

First it compares captured steps with launched ones and ends with an error where they differ. Then,
each beside its reference in the same run, interleaved, medians:
  G1  CIFAR-shaped InvP, ResNet-18 bf16, views, loss and bank on the device, fed as in training;
      against the captured backbone step, and a loop as the released code has it (fp32, DataLoader)
  G3  loss step at N = 50,000, B = 128; G4 at N = 1,281,167, B = 256; against the released
      computation, with peak memory and other block sizes
  G6  ResNet-50 and -18 at 224 px, B = 256, bf16: the InvP step against the backbone's
On a CPU the graphs are those of tests/reference/tape.py: that it runs says nothing about speed.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.reference.official import OfficialStep
from tests.reference.tape import TapeGraphs
from trainer import search
from trainer import step as step_module
from trainer.augment import apply_views
from trainer.capture import CapturedStep, CudaGraphs, Graphs
from trainer.config import Recipe, load_recipe
from trainer.decode_pool import DecodePool
from trainer.distributed import ALONE
from trainer.encoder import PIXEL_MEAN, PIXEL_STD, build_encoder
from trainer.feed import Batch, Feed
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective
from trainer.schedule import Position, epoch_batches
from trainer.session import build
from trainer.step import FIGURES, TrainingStep, fuse
from trainer.stock import CropStock

Body = Callable[[], Any]
LOSS_TOLERANCE = 1e-3  # relative, captured against launched: atomic sums have no fixed order
LAMBDA = 0.6
BLOCKS_MB = (64, 256, 1024)


class Bench:
    """The device, the sizes, and what was measured."""

    def __init__(self, device: torch.device, *, toy: bool) -> None:
        self.device, self.toy = device, toy
        self.rows: list[dict[str, Any]] = []

    def graphs(self) -> Graphs:
        return CudaGraphs(self.device) if self.device.type == "cuda" else TapeGraphs()

    def captured(self, body: Body) -> Body:
        graphs = self.graphs()
        graphs.warm_up(body, 3)
        return graphs.capture(body)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compare(
        self, name: str, variants: dict[str, Body], *, images: int, calls: int, rounds: int = 5
    ) -> dict[str, float]:
        """Time `calls` of each variant, in turns; median seconds of one call."""
        if self.toy:
            calls, rounds = 1, 1
        seconds: dict[str, list[float]] = {each: [] for each in variants}
        for turn in range(rounds + 1):
            for each, body in variants.items():
                self.wait()
                begin = time.perf_counter()
                for _ in range(calls):
                    body()
                self.wait()
                if turn or self.toy:  # the first turn warms up
                    seconds[each].append((time.perf_counter() - begin) / calls)
        medians = {each: statistics.median(values) for each, values in seconds.items()}
        first = next(iter(medians.values()))
        for each, median in medians.items():
            row = {
                "benchmark": name,
                "variant": each,
                "ms": median * 1e3,
                "images_per_s": images / median,
                "times_of_the_first": median / first,
                "raw_ms": [value * 1e3 for value in seconds[each]],
            }
            self.rows.append(row)
            print(
                f"{name:<22} {each:<34} {median * 1e3:10.3f} ms {images / median:12,.0f} images/s "
                f"{median / first:8.3f}x",
                flush=True,
            )
        return medians

    def peak(self, name: str, variant: str, body: Body) -> None:
        """Memory that a call takes beside what is held; 0 on a CPU, where torch does not count."""
        peak = 0
        if self.device.type == "cuda":
            self.wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            body()
            self.wait()
            peak = torch.cuda.max_memory_allocated(self.device) - before
        self.rows.append({"benchmark": name, "variant": variant, "peak_bytes": peak})
        print(f"{name:<22} {variant:<34} {peak / 1e6:10.1f} MB at most", flush=True)

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def recipe_of(bench: Bench, *words: str) -> Recipe:
    small = ("encoder.backbone=small", "encoder.image_size_px=32", "loss.num_background=16")
    few = ("loss.num_positives=4", "batch_size=8") if bench.toy else ()
    return load_recipe("cifar10", [*words, *(small if bench.toy else ()), *few])


def stock_of(images: NDArray[np.uint8], size_px: int) -> CropStock:
    source: Any = [None] * len(images)
    sizes = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
    return CropStock(source, list(images), DecodePool(0), size_px=size_px, sizes=sizes)


def make_step(bench: Bench, recipe: Recipe, count: int, resident: Tensor | None) -> TrainingStep:
    state = build(recipe, count, bench.device)
    generator = torch.Generator().manual_seed(1)
    state.bank.neighbours.copy_(
        torch.randint(0, count, state.bank.neighbours.shape, generator=generator)
    )
    state.encoder.train()
    step = TrainingStep(recipe, state, state.encoder, ALONE, lambda: 0, resident)
    fuse(state.optimiser)
    step.set_rate(recipe.optim.lr)
    return step


def backbone_step(bench: Bench, recipe: Recipe, seen: Tensor) -> Body:
    """Forward, backward and SGD of the same encoder; the loss is the sum of its embeddings."""
    state = build(recipe, 2, bench.device)
    state.encoder.train()
    fuse(state.optimiser)

    def body() -> None:
        bf16 = recipe.precision == "bf16"
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            embeddings = state.encoder(seen).embedding
        state.optimiser.zero_grad(set_to_none=True)
        embeddings.sum().backward()
        state.optimiser.step()

    return bench.captured(body)


def check_captured(bench: Bench, recipe: Recipe, stock: CropStock) -> None:
    """End the program where captured steps compute something else than launched ones."""
    figures = []
    for captured in (False, True):
        feed = Feed(recipe, stock, ALONE, bench.device, one_shape=True)
        if feed.resident is None:
            feed.hold(bench.device, 2**40)
        plain = make_step(bench, recipe, len(stock), feed.resident)
        step = CapturedStep(plain, bench.graphs()) if captured else plain
        batches = epoch_batches(recipe.seed, 1, len(stock), recipe.batch_size)[:6]
        found = []
        for number, batch in enumerate(feed.epoch(batches, Position(1, 0))):
            step.set_rate(0.03 / (1 + number))
            found.append(step(batch, weight=0.0 if number < 3 else LAMBDA))
        figures.append(torch.stack(found).cpu())
    off = ((figures[1] - figures[0]).abs() / figures[0].abs().clamp(min=1e-3))[:, :3].max().item()
    print(f"captured against launched: losses of six steps differ by {off:.1e} at most, relative")
    if not off <= LOSS_TOLERANCE:
        print(f"launched {figures[0]}\ncaptured {figures[1]}", file=sys.stderr)
        sys.exit(f"error: captured steps differ from launched ones by {off:.1e}")
    bench.rows.append({"benchmark": "correctness", "relative_difference_of_losses": off})


def official_loop(bench: Bench, recipe: Recipe, images: NDArray[np.uint8]) -> Body:
    """A step of the released loop: fp32, PIL views in a DataLoader, dense losses, three waits."""
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.encoder.image_size_px, scale=(0.2, 1.0)),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
    )
    data = _Views(images, change)
    workers = 0 if bench.toy else min(16, len(os.sched_getaffinity(0)))
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=bench.device.type == "cuda",
        persistent_workers=workers > 0,
    )

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()
    encoder = build_encoder(recipe.encoder).to(bench.device).train()
    optimiser = torch.optim.SGD(encoder.parameters(), 0.03, 0.9, weight_decay=5e-4)
    bank = MemoryBank(len(images), recipe.encoder.dim, 4).to(bench.device)
    official = OfficialStep(
        bank.embeddings,
        bank.neighbours.clamp(min=0),
        0.2,
        recipe.loss.num_background,
        3,
        recipe.loss.num_positives,
    )

    def body() -> None:
        pixels, indices = next(batches)
        pixels = pixels.to(bench.device, non_blocking=True)
        indices = indices.to(bench.device, non_blocking=True)
        outputs = torch.nn.functional.normalize(encoder.head(encoder.backbone(pixels)))
        instance, invariance, rows = official.losses(indices, outputs)
        loss = instance + LAMBDA * invariance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        official.update(indices, outputs.detach(), rows)
        for each in (loss, instance, invariance):
            each.item()

    return body


class _Views(torch.utils.data.Dataset[Any]):
    def __init__(self, images: NDArray[np.uint8], change: Callable[[Any], Tensor]) -> None:
        self._images, self._change = images, change

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._change(Image.fromarray(self._images[index])), index


def g1(bench: Bench) -> None:
    recipe = recipe_of(bench, "precision=bf16")
    draw = np.random.default_rng(0)
    count = 64 if bench.toy else 50_000
    images = draw.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    stock = stock_of(images, 32)
    check_captured(bench, recipe, stock)
    feed = Feed(recipe, stock, ALONE, bench.device, one_shape=True)
    if feed.resident is None:
        feed.hold(bench.device, 2**40)
    step = CapturedStep(make_step(bench, recipe, count, feed.resident), bench.graphs())

    def forever() -> Generator[Batch, None, None]:
        for epoch in itertools.count(1):
            batches = epoch_batches(recipe.seed, epoch, count, recipe.batch_size)
            yield from feed.epoch(batches, Position(epoch, 0))

    batches = forever()
    seen = torch.rand(recipe.batch_size, 3, 32, 32, device=bench.device)
    seen = seen.to(memory_format=torch.channels_last)
    for _ in range(2 if bench.toy else 200):  # every order of the colour changes is captured
        step(next(batches), weight=LAMBDA)
    medians = bench.compare(
        "G1 CIFAR R18",
        {
            "backbone step, captured": backbone_step(bench, recipe, seen),
            "InvP step, captured, fed": lambda: step(next(batches), weight=LAMBDA),
        },
        images=recipe.batch_size,
        calls=390,
    )
    fp32 = recipe_of(bench, "precision=fp32")
    loop = bench.compare(
        "G1 CIFAR R18",
        {"released loop, fp32": official_loop(bench, fp32, images)},
        images=recipe.batch_size,
        calls=60,
        rounds=3,
    )
    bare, ours = medians.values()
    print(
        f"G1: {recipe.batch_size / ours:,.0f} images/s (goal 40,000), {bare / ours:.2f} of the "
        f"backbone's speed (goal .90), {loop['released loop, fp32'] / ours:.1f}x the loop (goal 8)"
    )
    batches.close()


def loss_step(bench: Bench, name: str, count: int, batch: int) -> None:
    if bench.toy:
        count, batch = 600, 8
    background = min(4096, count // 4)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, 128, generator=generator).to(bench.device)
    member = torch.randint(0, 1000, (count,), generator=generator).to(bench.device)
    rows = torch.nn.functional.normalize(
        centres[member] + torch.randn(count, 128, generator=generator).to(bench.device)
    )
    indices = torch.randperm(count, generator=generator)[:batch].to(bench.device)
    fresh = rows[indices] + 0.05 * torch.randn(batch, 128, generator=generator).to(bench.device)
    fresh = torch.nn.functional.normalize(fresh)
    graph = torch.randint(0, count, (count, 4), generator=generator).to(bench.device)
    bank = MemoryBank(count, 128, 4).to(bench.device)
    bank.embeddings.copy_(rows)
    bank.neighbours.copy_(graph)
    official = OfficialStep(rows, graph, 0.07, background, 3, 50)

    def run_official() -> Tensor:
        outputs = fresh.clone().requires_grad_()
        instance, invariance, new = official.losses(indices, outputs)
        loss = instance + LAMBDA * invariance
        loss.backward()
        official.update(indices, outputs.detach(), new)
        return loss.detach()

    kept: dict[str, Tensor] = {}

    def ours(mode: Any) -> Body:
        config = LossConfig(0.07, background, 3, 50, mode=mode)

        def body() -> None:
            outputs = fresh.clone().requires_grad_()
            found = objective(bank, indices, outputs, config)
            loss = found.instance + LAMBDA * found.invariance
            loss.backward()
            bank.update(indices, outputs.detach())
            bank.refresh_neighbours(indices, found.nearest)
            kept.setdefault(mode, torch.empty_like(loss)).copy_(loss.detach())

        return body

    ours("official")()
    wanted = float(run_official())
    off = abs(float(kept["official"]) - wanted) / abs(wanted)
    print(f"{name}: loss against the released computation, relative {off:.1e}")
    if not off <= LOSS_TOLERANCE:
        sys.exit(f"error: {name}: the loss is {off:.1e} off the released computation")
    bench.peak(name, "released", run_official)
    variants: dict[str, Body] = {"released": run_official, "paper mode, launched": ours("paper")}
    default = search.DEVICE_BLOCK_BYTES
    for megabytes in BLOCKS_MB:
        search.DEVICE_BLOCK_BYTES = megabytes * 2**20
        bench.peak(name, f"paper mode, blocks of {megabytes} MB", ours("paper"))
        variants[f"captured, blocks of {megabytes} MB"] = bench.captured(ours("paper"))
    search.DEVICE_BLOCK_BYTES = default
    bench.compare(name, variants, images=batch, calls=30)
    bench.forget()


def g6(bench: Bench) -> None:
    for backbone in ("resnet50", "resnet18"):
        size = 32 if bench.toy else 224
        words = [f"encoder.backbone={backbone}", f"encoder.image_size_px={size}", "batch_size=256"]
        recipe = recipe_of(bench, "precision=bf16", *words)
        count = 64 if bench.toy else 1_281_167
        step = make_step(bench, recipe, count, None)
        generator = torch.Generator().manual_seed(0)
        indices = torch.randperm(count, generator=generator)[: recipe.batch_size].to(bench.device)
        seen = torch.rand(recipe.batch_size, 3, size, size, device=bench.device)
        seen = seen.to(memory_format=torch.channels_last)
        figures = torch.empty(len(FIGURES) + 1, device=bench.device)

        def invp(
            step: TrainingStep = step,
            indices: Tensor = indices,
            seen: Tensor = seen,
            figures: Tensor = figures,
        ) -> None:
            figures.copy_(step.learn(indices, seen, LAMBDA))

        bench.compare(
            f"G6 {backbone} {size} px",
            {
                "backbone step, captured": backbone_step(bench, recipe, seen),
                "InvP step, captured": bench.captured(invp),
            },
            images=recipe.batch_size,
            calls=20,
        )
        bench.forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no usable GPU; --toy --device cpu shows that the script runs")
    if options.device == "cpu" and not options.toy:
        sys.exit("error: on a CPU only --toy makes sense")
    bench = Bench(torch.device(options.device), toy=options.toy)
    began = time.monotonic()
    if options.device == "cpu":  # the paths of a GPU, with tensors of the CPU
        search._top_m_on_cpu = search._top_m_on_device  # type: ignore[assignment]
        step_module.apply_views = functools.partial(apply_views, fixed_shapes=True)  # type: ignore[assignment]
    else:
        torch.backends.cudnn.benchmark = True
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, toy sizes",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "matmul precision": torch.get_float32_matmul_precision(),
    }
    print(json.dumps(facts))
    try:
        g1(bench)
        bench.forget()
        loss_step(bench, "G3 N=50,000 B=128", 50_000, 128)
        loss_step(bench, "G4 N=1,281,167 B=256", 1_281_167, 256)
        g6(bench)
    finally:  # what was measured is kept whatever happens later
        facts["seconds"] = time.monotonic() - began
        options.output.write_text(json.dumps({"facts": facts, "rows": bench.rows}, indent=1))
    print(f"{options.output}, {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
