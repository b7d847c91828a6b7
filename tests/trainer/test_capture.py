"""The captured step is the uncaptured one: recorded on the CPU by tests/reference/tape.py.

Run: pytest tests/trainer/test_capture.py
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.reference.tape import TapeGraphs
from trainer import step as module
from trainer.augment import apply_views
from trainer.capture import WARM_UPS, CapturedStep
from trainer.config import Recipe
from trainer.decode_pool import DecodePool
from trainer.distributed import ALONE
from trainer.feed import Batch, Feed
from trainer.schedule import Position, epoch_batches
from trainer.session import build
from trainer.step import TrainingStep, fuse
from trainer.stock import CropStock

CPU = torch.device("cpu")
COUNT = 24  # three steps an epoch
IMAGES = [
    np.random.default_rng(i).integers(0, 256, (9, 9 + i % 2, 3)).astype(np.uint8)
    for i in range(COUNT)
]


def _stock(images: list[NDArray[np.uint8]]) -> CropStock:
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    source: Any = [None] * len(images)
    return CropStock(source, images, DecodePool(0), size_px=8, sizes=sizes)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of other devices than the CPU, with its tensors."""
    from trainer import search

    def fixed(*arguments: object, **named: object) -> Tensor:
        return apply_views(*arguments, **named, fixed_shapes=True)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "apply_views", fixed)
    monkeypatch.setattr(search, "_top_m_on_cpu", search._top_m_on_device)


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe]) -> Callable[..., tuple[TrainingStep, list[Batch]]]:
    """A step on fresh state, and the batches of the first epoch and the second."""

    def build_all(
        images: list[NDArray[np.uint8]], *overrides: str, resident: bool
    ) -> tuple[TrainingStep, list[Batch]]:
        recipe = tiny_recipe("data.holdout=0", "augment.jitter=0.8", "augment.blur=0.5", *overrides)
        stock = _stock(images)
        feed = Feed(recipe, stock, ALONE, CPU, one_shape=True)
        if resident:
            feed.hold(CPU, 10**6)
        state = build(recipe, len(stock), CPU)
        step = TrainingStep(recipe, state, state.encoder, ALONE, lambda: 0, feed.resident)
        fuse(state.optimiser)
        batches = [
            batch if batch.pixels is None else batch._replace(pixels=batch.pixels.clone())
            for epoch in (1, 2)
            for batch in feed.epoch(
                epoch_batches(recipe.seed, epoch, len(stock), recipe.batch_size),
                Position(epoch, 0),
            )
        ]
        return step, batches

    return build_all


def _state(step: TrainingStep) -> list[Tensor]:
    state = step._state
    momenta = [each["momentum_buffer"] for each in state.optimiser.state.values()]
    return [*state.encoder.state_dict().values(), *state.bank.buffers(), *momenta]


def _train(step: TrainingStep | CapturedStep, batches: list[Batch]) -> Tensor:
    """Two epochs: the rate falls within each, the invariance loss comes in with the second."""
    figures = []
    for number, batch in enumerate(batches):
        step.set_rate((0.03, 0.02, 0.01)[number // 2])
        figures.append(step(batch, weight=0.0 if number < 3 else 0.6))
    return torch.stack(figures)


# Of at least 32 px in bf16: where a tap of a convolution sees nothing but padding, oneDNN 3.x gives
# it a gradient of whatever was in memory.
BF16 = ("precision=bf16", "encoder.image_size_px=32")


@pytest.mark.parametrize(
    ("source", "words"),
    [("resident", ()), ("resident", BF16), ("one size", ()), ("many sizes", ())],
)
def test_captured_step__is_the_same_run(
    make: Callable[..., tuple[TrainingStep, list[Batch]]], source: str, words: tuple[str, ...]
) -> None:
    images = IMAGES if source == "many sizes" else IMAGES[::2] + IMAGES[::2]
    plain, batches = make(images, *words, resident=source == "resident")
    wanted = _train(plain, batches)
    inner, batches = make(images, *words, resident=source == "resident")
    graphs = TapeGraphs()
    found = _train(CapturedStep(inner, graphs), batches)

    assert torch.equal(found, wanted)
    for one, other in zip(_state(inner), _state(plain), strict=True):
        assert torch.equal(one, other)
    assert len(found.unique(dim=0)) == 6  # no step repeats another's figures
    plans = len({batch.like.plan for batch in batches})
    learning = 2  # without the invariance loss and with it
    assert graphs.captures == plans + learning
    assert graphs.warm_ups == plans + learning * WARM_UPS
    assert graphs.replays == 2 * 6
