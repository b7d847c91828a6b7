"""The parts of a small run, put together without the command, and what equal runs agree in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.tiny_run import without_timings
from trainer.checkpoint import Progress
from trainer.config import Recipe
from trainer.datasets import open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import survey
from trainer.inspection import build_inspector
from trainer.monitor import KnnMonitor
from trainer.pretrain import Pretraining
from trainer.representation.preprocess import InputContract
from trainer.run_folder import Journal, RunFolder
from trainer.session import build
from trainer.step import loss_config
from trainer.stock import CropStock

Run = Callable[..., Pretraining]


@pytest.fixture
def run(tmp_path: Path, packed: Callable[..., Path], tiny_recipe: Callable[..., Recipe]) -> Any:
    """Build everything for a run of 40 images, 8 in a batch: 5 steps an epoch."""
    source = open_source(str(packed(40)))
    journals = []

    def make(folder: str, *overrides: str, before: Progress | None = None) -> Pretraining:
        recipe = tiny_recipe("data.holdout=0", *overrides)
        pool = DecodePool(0)
        found = survey(source, pool, recipe.data, size_px=8)
        (tmp_path / folder).mkdir(exist_ok=True)
        journals.append(
            Journal(RunFolder(tmp_path / folder), before.metrics if before else ()),
        )
        assert source.labels is not None
        images = np.stack([image[:8, :8] for image in found.stored or ()])
        return Pretraining(
            recipe=recipe,
            device=torch.device("cpu"),
            stock=CropStock(source, found.stored, pool, size_px=8, sizes=found.sizes),
            state=build(recipe, 40, torch.device("cpu")),
            monitor=KnnMonitor(images, source.labels, None, source.labels, k=3),
            journal=journals[-1],
            checkpoints=tmp_path / folder / "checkpoints",
            data_fingerprint="f00d",
            inspector=build_inspector(
                source,
                recipe.monitor,
                loss_config(recipe),
                InputContract(size_px=8),
                pool,
                seed=recipe.seed,
            ),
        )

    yield make
    for journal in journals:
        journal.__exit__(None, None, None)


def tensors_of(run: Pretraining) -> list[torch.Tensor]:
    momenta = [values["momentum_buffer"] for values in run.state.optimiser.state.values()]
    return [
        *run.state.encoder.state_dict().values(),
        *run.state.bank.state_dict().values(),
        *momenta,
    ]


def figures_of(run: Pretraining) -> list[dict[str, Any]]:
    return [without_timings(line) for line in run.journal.lines]
