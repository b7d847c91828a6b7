"""A program for test_equality.py: a few steps of training as one rank of any number.

    python tests/distributed/some_steps.py IMAGES.npz OUTPUT [key=value ...]

Writes OUTPUT-RANK.pt: the losses of each step, bank and graph, weights, gradients (as momenta).
"""

import os
import sys
from pathlib import Path

import torch

from trainer import pretrain as training
from trainer import step as module
from trainer.config import load_recipe
from trainer.datasets import open_source
from trainer.decoding import DecodePool, survey
from trainer.distributed import open_ranks
from trainer.launch import read_launch
from trainer.objective import Objective
from trainer.pretrain import Pretraining, pretrain
from trainer.run_folder import Journal
from trainer.schedule import Position
from trainer.session import build
from trainer.stock import CropStock


def main(images: str, output: str, *overrides: str) -> None:
    """Train on pairs of equal bank rows, so that every similarity comes twice."""
    recipe = load_recipe("digits", overrides)
    source, pool = open_source(images), DecodePool(0)
    found = survey(source, pool, recipe.data, size_px=8)
    device = torch.device("cpu")
    state = build(recipe, len(source), device)
    half = len(source) // 2
    state.bank.embeddings[half:] = state.bank.embeddings[:half]
    ranks = open_ranks(read_launch(os.environ)).open_training(device, 60)

    losses: list[list[float]] = []
    nearest: list[torch.Tensor] = []
    real = module.objective

    def listening(*arguments: object) -> Objective:
        found = real(*arguments)  # type: ignore[arg-type]
        nearest.append(found.nearest)
        return found

    module.objective = listening
    run = Pretraining(
        recipe=recipe,
        device=device,
        stock=CropStock(source, found.stored, pool, size_px=8, sizes=found.sizes),
        state=state,
        monitor=None,
        journal=Journal(None),
        checkpoints=Path(f"{output}-checkpoints"),
        data_fingerprint="f00d",
        ranks=ranks,
    )
    check = training._check_finite

    def recording(figures: module.StepFigures, position: Position) -> None:
        losses.append([figures.means["instance"], figures.means["invariance"]])
        check(figures, position)

    training._check_finite = recording
    pretrain(run)
    torch.save(
        {
            "lines": [
                {name: value for name, value in line.items() if name != "images_per_s"}
                for line in run.journal.lines
            ],
            "losses": torch.tensor(losses),
            "nearest": torch.stack(nearest),
            "bank": state.bank.state_dict(),
            "encoder": state.encoder.state_dict(),
            "momenta": {
                name: state.optimiser.state[parameter]["momentum_buffer"]
                for name, parameter in state.encoder.named_parameters()
            },
            "layers": [type(each).__name__ for each in state.encoder.modules()],
        },
        f"{output}-{ranks.rank}.pt",
    )
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
