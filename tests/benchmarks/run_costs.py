"""What a run costs: memory, disk, traffic and arithmetic by recipe, N, B and processes.

    python tests/benchmarks/run_costs.py cifar10 --images 50000
    python tests/benchmarks/run_costs.py imagenet-r50-mlp --images 1281167 --processes 8
    python tests/benchmarks/run_costs.py imagenet-r50-mlp --images 1281167 batch_size=1024
    python tests/benchmarks/run_costs.py digits --images 2000 --measure encoder.image_size_px=32

All is computed from the recipe, but for what `--measure` adds: a real run of one epoch on the CPU
on that many random images, its peak resident memory (Linux), its speed, and what it wrote.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.config import Recipe, load_recipe
from trainer.encoder import Encoder, build_encoder
from trainer.export import GALLERY_NEIGHBOURS
from trainer.schedule import steps_per_epoch

FLOAT, ID = 4, 8  # bytes: float32, int64
STORED_PER_CROP = 256 / 224  # trainer/datasets/source.py
PHOTO_ASPECT = 4 / 3
BACKWARD = 2  # of a forward pass's arithmetic: gradients of inputs and of weights


def parameters(encoder: Encoder) -> int:
    return sum(each.numel() for each in encoder.parameters())


def forward_flop(encoder: Encoder, size_px: int) -> int:
    """Of one image; a multiplication and its addition count as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.eval()(torch.empty(1, 3, size_px, size_px, device="meta"))
    return int(counter.get_total_flops())


def saved_bytes(encoder: Encoder, batch: int, size_px: int) -> int:
    """What autograd keeps of one forward pass of `batch` images in float32, each storage once."""
    own = {each.untyped_storage()._cdata for each in encoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder.train()(torch.empty(batch, 3, size_px, size_px, device="meta"))
    return sum(storage.nbytes() for storage in kept.values())


def costs(recipe: Recipe, images: int, processes: int) -> Iterator[tuple[str, str]]:
    """Name and value of each cost."""
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
    size, dim, batch = recipe.encoder.image_size_px, recipe.encoder.dim, recipe.batch_size
    k, share = recipe.bank.num_neighbours, math.ceil(batch / processes)
    weights = parameters(encoder) * FLOAT
    statistics = sum(each.numel() * each.element_size() for each in encoder.buffers())
    bank, graph = images * dim * FLOAT, images * k * ID
    held = math.ceil(images / processes) * dim * FLOAT if recipe.bank.sharded else bank
    steps = steps_per_epoch(images, batch)
    flop = forward_flop(encoder, size) * (1 + BACKWARD)
    scan = 2 * images * dim
    side = round(size * STORED_PER_CROP)
    gallery = images * (dim * FLOAT + GALLERY_NEIGHBOURS * (ID + FLOAT))
    exchanged = batch * (dim * FLOAT + (k + 1) * ID)

    yield "steps an epoch", f"{steps:,}"
    yield "steps of the run", f"{steps * recipe.epochs:,}"
    yield "images seen in the run", f"{steps * recipe.epochs * batch / 1e6:,.1f} M"
    yield "weights (gradients and momenta as much each)", _bytes(weights)
    yield (
        f"kept for backward, {share} images a process, fp32",
        _bytes(saved_bytes(encoder, share, size)),
    )
    yield "bank, on each process", _bytes(held)
    yield "graph, on each process", _bytes(graph)
    yield "official computation's B x N, three times", _bytes(3 * batch * images * FLOAT)
    yield "a checkpoint", _bytes(2 * weights + statistics + bank + graph)
    yield "the bundle in fp32, without ids", _bytes(2 * (weights + statistics) + gallery)
    yield f"images held, of {side} px square, on each process", _bytes(images * side * side * 3)
    yield f"or of {side} px and 4:3", _bytes(round(images * side * side * PHOTO_ASPECT * 3))
    yield "encoder's arithmetic, an image", f"{flop / 1e9:,.2f} GFLOP"
    yield "scan of the bank, an image", f"{scan / 1e9:,.3f} GFLOP"
    yield (
        "arithmetic of the run",
        f"{steps * recipe.epochs * batch * (flop + scan) / 1e18:,.3f} EFLOP",
    )
    yield "exact graph at the export", f"{2 * images**2 * dim / 1e12:,.1f} TFLOP"
    if processes > 1:
        ring = 2 * weights * (processes - 1) / processes
        yield "sent by a process in a step: gradients", _bytes(round(ring))
        yield "received by a process in a step: embeddings, rows", _bytes(exchanged)


def measure(recipe: str, overrides: Sequence[str], images: int) -> Iterator[tuple[str, str]]:
    """Train one epoch on random images and export, in a process of its own."""
    resolved = load_recipe(recipe, overrides)
    side = resolved.encoder.image_size_px
    with tempfile.TemporaryDirectory() as place:
        data, output = Path(place, "images.npz"), Path(place, "run")
        pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
        np.savez(data, images=pixels)
        words = [recipe, *overrides, "epochs=1", "device=cpu", "data.workers=0"]
        began = subprocess.Popen(
            [sys.executable, "-m", "trainer.run", "--data", data, "--output", output, *words],
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        _, status, used = os.wait4(began.pid, 0)
        if status:
            raise SystemExit("the run failed, see what it said")
        line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        (checkpoint,) = (output / "checkpoints").iterdir()
        yield "measured: peak resident memory", _bytes(used.ru_maxrss * 1024)
        yield "measured: images/s in training", f"{line['images_per_s']:,.0f}"
        yield "measured: CPU time of the whole", f"{used.ru_utime + used.ru_stime:,.0f} s"
        yield "measured: the checkpoint", _bytes(_on_disk(checkpoint))
        yield "measured: the bundle", _bytes(_on_disk(output / "bundle"))


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="RECIPE | key=value")
    parser.add_argument("--images", type=int, required=True, help="N")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="also train one epoch, on the CPU")
    options = parser.parse_intermixed_args()
    (name,) = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    recipe = load_recipe(name, overrides)
    print(
        f"{name} {' '.join(overrides)}: N = {options.images:,}, B = {recipe.batch_size}, "
        f"{options.processes} processes, {recipe.epochs} epochs"
    )
    rows = list(costs(recipe, options.images, options.processes))
    if options.measure:
        rows += measure(name, overrides, options.images)
    for what, value in rows:
        print(f"  {what:<56}{value:>14}")


if __name__ == "__main__":
    main()
