"""Loss step of one batch (forward, backward, graph and bank update) against the official one.

    python tests/benchmarks/loss_step.py            # N = 50,000, B = 128: goal >= 3.5x
    python tests/benchmarks/loss_step.py --images 1281167 --batch 16

One thread, the two interleaved, medians. Also says how far loss and gradient are apart. Freed
memory is kept for the next step, as trainer.run does, which helps both; `--allocator default`
leaves the C library as it is, as the released code did.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.reference.official import OfficialStep
from trainer.host_memory import keep_freed_memory
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective

WARM_UP = 31  # epochs; the invariance loss counts after them, so both losses are measured
WEIGHT = 0.6  # lambda of the paper


def clustered(num_images: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit rows around 1,000 centres: similarities spread as in a trained bank."""
    centres = torch.randn(1000, dim, generator=generator)
    member = torch.randint(0, 1000, (num_images,), generator=generator)
    noise = torch.randn(num_images, dim, generator=generator)
    return torch.nn.functional.normalize(centres[member] + noise, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--background", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.allocator == "kept":
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    dim, k, steps, num_positives, temperature = 128, 4, 3, 50, 0.07

    rows = clustered(options.images, dim, generator)
    indices = torch.randperm(options.images, generator=generator)[: options.batch]
    fresh = rows[indices] + 0.05 * torch.randn(options.batch, dim, generator=generator)
    fresh = torch.nn.functional.normalize(fresh, dim=1)
    graph = torch.randint(0, options.images, (options.images, k), generator=generator)

    config = LossConfig(
        temperature=temperature,
        num_background=options.background,
        steps=steps,
        num_positives=num_positives,
        mode="official",
    )
    bank = MemoryBank(options.images, dim, k)
    official = OfficialStep(
        rows.clone(), graph.clone(), temperature, options.background, steps, num_positives
    )

    def reset() -> None:
        bank.embeddings.copy_(rows)
        bank.neighbours.copy_(graph)
        official.bank.copy_(rows)
        official.neighbours.copy_(graph)

    def run_official() -> tuple[Tensor, Tensor]:
        outputs = fresh.clone().requires_grad_()
        instance, invariance, new_rows = official.losses(indices, outputs)
        loss = instance + WEIGHT * invariance
        loss.backward()
        official.update(indices, outputs, new_rows)
        assert outputs.grad is not None
        return loss.detach(), outputs.grad

    def run_ours(mode: str) -> Callable[[], tuple[Tensor, Tensor]]:
        chosen = LossConfig(**{**vars(config), "mode": mode})

        def run() -> tuple[Tensor, Tensor]:
            outputs = fresh.clone().requires_grad_()
            found = objective(bank, indices, outputs, chosen)
            loss = found.instance + WEIGHT * found.invariance
            loss.backward()
            bank.update(indices, outputs.detach())
            bank.refresh_neighbours(indices, found.nearest)
            assert outputs.grad is not None
            return loss.detach(), outputs.grad

        return run

    scores = torch.empty(options.batch, options.images)

    def run_matmul() -> tuple[Tensor, Tensor]:
        torch.mm(fresh, rows.T, out=scores)
        return scores, scores

    variants = {
        "official": run_official,
        "ours, official mode": run_ours("official"),
        "ours, paper mode": run_ours("paper"),
        "bare matmul of the scan": run_matmul,
    }
    reset()
    loss, gradient = run_official()
    official_rows = official.neighbours[indices]
    reset()
    our_loss, our_gradient = run_ours("official")()
    same_rows = official_rows.sort(dim=1).values == bank.neighbours[indices].sort(dim=1).values
    print(f"loss, relative difference      {float(abs(our_loss - loss) / abs(loss)):.2e}")
    distance = float((our_gradient - gradient).norm() / gradient.norm())
    print(f"gradient, relative difference  {distance:.2e}")
    print(f"graph rows set-equal           {float(same_rows.float().mean()):.4f}")

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, run in variants.items():
            reset()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"N = {options.images:,}, B = {options.batch}, M = {options.background}, one thread")
    for name, median in medians.items():
        ratio = medians["official"] / median
        print(f"{name:<26} {median * 1e3:8.1f} ms   {ratio:5.2f}x the official speed")
    scan = medians["bare matmul of the scan"]
    print(f"paper mode / bare matmul       {medians['ours, paper mode'] / scan:.2f}")


if __name__ == "__main__":
    main()
