"""Spawned processes that decode: order, death, and being left.

Run: pytest tests/trainer/test_decode_pool.py
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from tests.trainer.occupied_pool import occupy
from trainer.datasets import DataError
from trainer.decode_pool import DecodePool


def _die(item: int) -> int:
    os._exit(item)


def test_pool__whose_process_dies() -> None:
    with DecodePool(1) as pool, pytest.raises(DataError, match="decoding process died"):
        list(pool.stream(_die, [3]))


def _die_at_zero(item: int) -> int:
    if item == 0:
        os._exit(3)
    return item


@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", range(8))
def test_pool__whose_process_dies_goes_on_wherever_in_the_queue_it_was(first: int) -> None:
    items = [*range(-first, 0), 0, *range(1, 20)]
    with DecodePool(2) as pool:
        answers = list(pool.stream(_die_at_zero, items, rescue=lambda item: item + 100))
    assert [a if a < 50 else a - 100 for a in answers] == items
    assert answers[first] == 100


@pytest.mark.timeout(60)
def test_pool__whose_process_dies_after_its_stream_was_left_tells_who_waits(tmp_path: Path) -> None:
    others: list[Future[int]] = []

    def items() -> Iterator[int]:
        yield from (-1, -2)
        others.append(pool.submit(abs, -3))
        raise KeyError("the source")

    with DecodePool(1) as pool:
        told = occupy(pool, tmp_path)
        with pytest.raises(KeyError, match="the source"):
            list(pool.stream(abs, items()))
        told.touch()
        with pytest.raises(BrokenProcessPool):
            others[0].result(timeout=30)


def test_pool__that_is_left_early_ends() -> None:
    with DecodePool(1) as pool:
        stream = pool.stream(abs, range(-100, 0))
        assert next(stream) == 100
        stream.close()  # type: ignore[attr-defined]
