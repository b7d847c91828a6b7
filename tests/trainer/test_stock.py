"""Batches of pixels, held in memory or decoded by processes into shared blocks.

Run: pytest tests/trainer/test_stock.py
"""

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.occupied_pool import occupy
from trainer import shared_block
from trainer import stock as module
from trainer.config import load_recipe
from trainer.datasets import DataError, ImageSource, open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import Survey, survey
from trainer.shared_block import BlockName, NoMemoryError, SharedBlock, attach, available_bytes
from trainer.stock import AHEAD, CropStock

ImagesOf = Callable[..., list[list[np.ndarray]]]


def _survey(source: ImageSource) -> Survey:
    with DecodePool(0) as pool:
        return survey(source, pool, load_recipe("folder").data, size_px=8)


def _stock(found: Survey, pool: DecodePool, *, held: bool = False) -> CropStock:
    stored = found.stored if held else None
    return CropStock(found.source, stored, pool, size_px=8, sizes=found.sizes)


def test_stock__decoded_anew_gives_the_pixels_held_in_memory(
    pictures: Callable[..., Path], images_of: ImagesOf
) -> None:
    found = _survey(open_source(str(pictures(20))))
    batches = [np.array([3, 1, 19]), np.array([0, 0, 7]), *[np.array([i]) for i in range(9)]]
    batches.append(np.arange(20))  # in parts, and larger than all before it
    with DecodePool(0) as pool:
        held = images_of(_stock(found, pool, held=True).batches(batches))
        alone = images_of(_stock(found, pool).batches(batches))
    with DecodePool(2) as pool:
        spawned = images_of(_stock(found, pool).batches(batches))
    assert found.stored is not None
    for indices, *three in zip(batches, held, alone, spawned, strict=True):
        for made in three:
            for i, image in zip(indices, made, strict=True):
                assert image.shape == found.stored[i].shape
                assert (image == found.stored[i]).all()


@pytest.mark.parametrize("held", [True, False])
def test_stock__blocks_are_as_large_as_the_batch_or_all_alike(
    pictures: Callable[..., Path], held: bool
) -> None:
    found = _survey(open_source(str(pictures(6, nested=False))))
    assert found.sizes.tolist() == [[9, 9], [10, 9], [10, 9]] * 2
    batches = [np.array([0, 3]), np.array([1, 0])]
    with DecodePool(0) as pool:
        stock = _stock(found, pool, held=held)
        shapes = [block.pixels.shape for block in stock.batches(batches)]
        assert shapes == [(2, 9, 9, 3), (2, 10, 9, 3)]
        shapes = [block.pixels.shape for block in stock.batches(batches, one_shape=True)]
        assert shapes == [(2, 10, 9, 3)] * 2


def test_stock__uses_few_blocks_again_and_leaves_none_behind(
    pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counting(num_bytes: int) -> SharedBlock:
        made.append(num_bytes)
        return SharedBlock(num_bytes)

    monkeypatch.setattr(module, "SharedBlock", counting)
    found = _survey(open_source(str(pictures(20))))
    resource_tracker.ensure_running()  # begun by the first pool of a process, it holds one as well
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with DecodePool(1) as pool:
        stock = _stock(found, pool)
        for _ in range(2):
            seen = [
                int(block.pixels.sum()) for block in stock.batches(np.arange(20).reshape(10, 2))
            ]
            assert len(seen) == 10
        assert made == [2 * 10 * 9 * 3] * (AHEAD + 1)
        # Left in the middle: what is under way ends before its block is used again.
        stream = stock.batches(np.arange(20).reshape(10, 2))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        again = [int(block.pixels.sum()) for block in stock.batches(np.arange(20).reshape(10, 2))]
        assert again == seen
        assert len(made) == AHEAD + 1
        del stock, stream
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_stock__file_that_went_away_since(pictures: Callable[..., Path]) -> None:
    root = pictures(4, nested=False)
    found = _survey(open_source(str(root)))
    (root / "002.png").unlink()
    with DecodePool(1) as pool, pytest.raises(DataError, match=r"002\.png could be read when"):
        list(_stock(found, pool).batches([np.array([2])]))


def test_stock__file_that_changed_its_size_since(pictures: Callable[..., Path]) -> None:
    root = pictures(4, nested=False)
    found = _survey(open_source(str(root)))
    Image.new("RGB", (5, 7)).save(root / "002.png")
    told = r"002\.png could be .* \(7 x 5 pixels instead of 10 x 9\)"
    with DecodePool(0) as pool, pytest.raises(DataError, match=told):
        list(_stock(found, pool).batches([np.array([2])]))


class Killer:
    """A picture that could be decoded when the run began, and kills its decoder now."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


def test_stock__whose_process_dies(pictures: Callable[..., Path]) -> None:
    found = _survey(open_source(str(pictures(4, nested=False))))
    source = ImageSource(found.source.ids, [Killer()] * 4, None, "f00d")
    with DecodePool(1) as pool:
        stock = CropStock(source, None, pool, size_px=8, sizes=found.sizes)
        with pytest.raises(DataError, match="decoding process died"):
            list(stock.batches([np.array([2, 1])]))


@pytest.mark.timeout(60)
def test_stock__whose_process_dies_after_it_was_left_ends(
    pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.arange(8)
        told.touch()
        raise KeyError("the sampler")

    monkeypatch.setattr(module, "LEAST_PART", 1)
    monkeypatch.setattr(module, "LARGEST_PART", 1)
    found = _survey(open_source(str(pictures(8, nested=False))))
    (tmp_path / "pool").mkdir()
    with DecodePool(1) as pool:
        told = occupy(pool, tmp_path / "pool")
        with pytest.raises(KeyError, match="the sampler"):
            list(_stock(found, pool).batches(batches()))


def test_stock__says_how_much_memory_it_lacks(
    pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(num_bytes: int) -> SharedBlock:
        raise NoMemoryError(f"{num_bytes:,} bytes of shared memory are not to be had")

    monkeypatch.setattr(module, "SharedBlock", none)
    found = _survey(open_source(str(pictures(4, nested=False))))
    told = r"batches of 3 images of up to 10 x 9 pixels .* 810 bytes .*Lower batch_size"
    with DecodePool(0) as pool, pytest.raises(DataError, match=told):
        list(_stock(found, pool).batches([np.array([2, 1, 0])]))


def test_shared_block__that_no_machine_has() -> None:
    with pytest.raises(NoMemoryError, match=r"1,152,921,504,606,846,976 bytes .*[0-9] are free"):
        SharedBlock(1 << 60)


def test_shared_block__keeps_to_the_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = available_bytes()
    monkeypatch.setattr(shared_block, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    with pytest.raises(NoMemoryError, match=r"1,001 bytes .*1,000 are free"):
        SharedBlock(1001)
    SharedBlock(1000)


def test_shared_block__is_found_by_its_name_while_it_lives() -> None:
    block = SharedBlock(100)
    attach(block.name)[7] = 42
    assert block.memory[7] == 42
    assert torch.frombuffer(block.memory, dtype=torch.uint8)[7] == 42
    name = BlockName(*block.name)._replace(serial=-1)  # not from the cache
    del block
    with pytest.raises(OSError, match="No such file"):
        attach(name)
