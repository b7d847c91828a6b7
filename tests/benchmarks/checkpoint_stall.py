"""What training waits for a checkpoint: written beside the steps, and before the next step.

    python tests/benchmarks/checkpoint_stall.py                   # goal: <= 5 % stall
    python tests/benchmarks/checkpoint_stall.py --every 4 --rounds 5

Steps of a ResNet-18 at 32 px with a bank of 50,000 rows, one thread. Rounds of `every` steps
without a save, with one written beside them (as training does), and with one waited for;
interleaved, medians. Stall: by how much a round with a save is longer, as a share of one without.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.checkpoint import Progress, Retention, TrainingState
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import EncoderConfig
from trainer.encoder import build_encoder
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective
from trainer.schedule import Position

KINDS = ("no save", "beside", "waited for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = build_encoder(
        EncoderConfig(backbone="resnet18", image_size_px=32, head="mlp", dim=128, normalise=False)
    )
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainingState(
        encoder,
        MemoryBank(options.images, 128, 4),
        torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9),
    )
    config = LossConfig(
        temperature=0.07, num_background=4096, steps=3, num_positives=50, mode="paper"
    )

    def step() -> None:
        pixels = torch.rand(options.batch, 3, 32, 32).to(memory_format=torch.channels_last)
        indices = torch.randperm(options.images)[: options.batch]
        embeddings = encoder(pixels).embedding
        found = objective(state.bank, indices, embeddings, config)
        state.optimiser.zero_grad(set_to_none=True)
        (found.instance + 0.6 * found.invariance).backward()
        state.optimiser.step()
        state.bank.update(indices, embeddings.detach())
        state.bank.refresh_neighbours(indices, found.nearest)

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    calls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    saved = 0
    step()
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(Path(folder), Retention(2, 0, 10**6)) as writer,
    ):
        for number in range(options.rounds + 1):
            for kind in KINDS:
                began = time.perf_counter()
                if kind != "no save":
                    saved += 1
                    progress = Progress(Position(1, saved), {}, "f00d", {}, [{"epoch": 1}] * 200)
                    writer.save(state, progress)
                    if kind == "waited for":
                        writer.wait()
                called = time.perf_counter() - began
                for _ in range(options.every):
                    step()
                if number > 0:  # the first one allocates the copies
                    seconds[kind].append(time.perf_counter() - began)
                    calls[kind].append(called)
                writer.wait()
        path = writer.wait()
        assert path is not None
        size = sum(file.stat().st_size for file in path.iterdir())
    print(
        f"ResNet-18, 32 px, B = {options.batch}, N = {options.images:,}, one thread; "
        f"{size / 1e6:.0f} MB a checkpoint, one every {options.every} steps, "
        f"{options.rounds} rounds of each"
    )
    plain = statistics.median(seconds["no save"])
    for kind in KINDS:
        median = statistics.median(seconds[kind])
        print(
            f"{kind:<11} {median:7.2f} s a round ({median / options.every * 1e3:5.0f} ms a step), "
            f"{median / plain - 1:+7.2%}; the call itself "
            f"{statistics.median(calls[kind]) * 1e3:6.1f} ms, "
            f"{statistics.median(calls[kind]) / plain:6.2%} of a round; "
            f"all: {', '.join(f'{value:.2f}' for value in seconds[kind])}"
        )


if __name__ == "__main__":
    main()
