"""Batches as the step gets them: packed, from wherever the images are, ahead and in order.

Run: pytest tests/trainer/test_feed.py
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainer.augment import apply_views, draw_views
from trainer.config import Recipe
from trainer.decode_pool import DecodePool
from trainer.distributed import ALONE, Ranks
from trainer.feed import Batch, Feed, prefetched
from trainer.launch import Launch
from trainer.schedule import Position, epoch_batches, view_generator
from trainer.stock import CropStock

CPU = torch.device("cpu")


def _images(sizes: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe]) -> Callable[..., tuple[Recipe, Feed]]:
    def build(images: list[NDArray[np.uint8]], ranks: Ranks = ALONE) -> tuple[Recipe, Feed]:
        recipe = tiny_recipe("batch_size=4", "augment.flip=0.5")
        sizes = np.array([image.shape[:2] for image in images], np.int32)
        source: Any = [None] * len(images)
        stock = CropStock(source, images, DecodePool(0), size_px=8, sizes=sizes)
        return recipe, Feed(recipe, stock, ranks, CPU)

    return build


def _of_epoch(recipe: Recipe, feed: Feed, count: int, *, done: int = 0) -> list[Batch]:
    batches = epoch_batches(recipe.seed, 3, count, recipe.batch_size)[done:]
    return [
        batch if batch.pixels is None else batch._replace(pixels=batch.pixels.clone())
        for batch in feed.epoch(batches, Position(3, done))
    ]


def test_batch__holds_what_was_drawn_to_the_last_bit(
    make: Callable[..., tuple[Recipe, Feed]],
) -> None:
    images = _images([(9, 9), (8, 12)] * 4)
    recipe, feed = make(images)
    for step, batch in enumerate(_of_epoch(recipe, feed, 8), 1):
        indices = epoch_batches(recipe.seed, 3, 8, 4)[step - 1]
        assert batch.indices.tolist() == indices.tolist()
        sizes = torch.tensor([images[i].shape[:2] for i in indices])
        assert batch.pixels is not None
        for row, index in enumerate(indices):  # what is beside an image is never read
            height, width, _ = images[index].shape
            assert (batch.pixels[row, :height, :width].numpy() == images[index]).all()
        wanted = draw_views(recipe.augment, sizes, view_generator(recipe.seed, 3, step))
        for found, drawn in zip(batch.like.unpack(batch.drawn), wanted, strict=True):
            if isinstance(drawn, torch.Tensor):
                assert found.dtype == drawn.dtype
                assert torch.equal(found, drawn)
            else:
                assert found == drawn


def test_epoch__goes_on_after_a_step(make: Callable[..., tuple[Recipe, Feed]]) -> None:
    recipe, feed = make(_images([(9, 9)] * 16))
    whole, rest = _of_epoch(recipe, feed, 16), _of_epoch(recipe, feed, 16, done=3)
    assert [batch.message.tolist() for batch in rest] == [
        batch.message.tolist() for batch in whole[3:]
    ]


def test_ranks__get_their_share_of_what_one_process_gets(
    make: Callable[..., tuple[Recipe, Feed]],
) -> None:
    images = _images([(9, 9), (8, 12)] * 4)
    recipe, feed = make(images)
    alone = _of_epoch(recipe, feed, 8)
    second = Ranks(Launch(rank=1, size=2, local_rank=1, local_size=2, restarts=0))
    for one, half in zip(alone, _of_epoch(*make(images, second), 8), strict=True):
        assert half.indices.tolist() == one.indices.tolist()
        assert torch.equal(half.drawn, one.drawn[2:])


def test_hold__gives_the_same_views_from_one_block(
    make: Callable[..., tuple[Recipe, Feed]],
) -> None:
    images = _images([(9, 9), (8, 12), (11, 8)] * 4)
    recipe, feed = make(images)
    brought = _of_epoch(recipe, feed, 12)
    feed.hold(CPU, limit_bytes=12 * 11 * 12 * 3)
    assert feed.resident is not None
    assert feed.resident.shape == (12, 11, 12, 3)
    for with_pixels, without in zip(brought, _of_epoch(recipe, feed, 12), strict=True):
        assert without.pixels is None
        assert torch.equal(without.message, with_pixels.message)
        views = without.like.unpack(without.drawn)
        assert with_pixels.pixels is not None
        torch.testing.assert_close(
            apply_views(feed.resident[without.indices], views, size_px=8),
            apply_views(with_pixels.pixels, views, size_px=8),
        )
    assert "held on the device" in feed.describe()


def test_hold__what_is_too_large_stays(make: Callable[..., tuple[Recipe, Feed]]) -> None:
    _, feed = make(_images([(9, 9)] * 4))
    feed.hold(CPU, limit_bytes=4 * 9 * 9 * 3 - 1)
    assert feed.resident is None
    assert feed.describe() == "images in memory"


def test_prefetched__keeps_order_and_runs_a_bounded_way_ahead() -> None:
    made = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(20):
            made.release()
            yield number

    ahead = prefetched(items(), 3)
    assert next(ahead) == 0
    for _ in range(4):  # the one that was taken, and three more without being asked
        assert made.acquire(timeout=5)
    assert list(ahead) == list(range(1, 20))
    assert _feeding() == []


def test_prefetched__raises_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    ahead = prefetched(items(), 3)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)


def test_prefetched__closed_early_ends_its_thread_and_its_items() -> None:
    ended = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.append(threading.current_thread())

    ahead = prefetched(items(), 3)
    next(ahead)
    ahead.close()
    assert len(ended) == 1
    assert _feeding() == []


def _feeding() -> list[str]:
    """Threads of a feed that still run; other tests may have left threads of libraries."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]
