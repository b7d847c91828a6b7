"""Spawned processes that decode: order, death, and being left.

Run: pytest tests/trainer/test_decode_pool.py
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

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


def _die_or_dawdle(item: int) -> int:
    if item == 0:
        os._exit(3)
    time.sleep(2)
    return item


@pytest.mark.timeout(60)
def test_pool__whose_process_dies_after_its_stream_was_left_tells_who_waits() -> None:
    others: list[Future[int]] = []

    def items() -> Iterator[int]:
        yield from range(4)  # more than the queue of two processes takes while they start
        others.append(pool.submit(abs, -1))
        raise KeyError("the source")

    with DecodePool(2) as pool:
        with pytest.raises(KeyError, match="the source"):
            list(pool.stream(_die_or_dawdle, items()))
        with pytest.raises(BrokenProcessPool):
            others[0].result()


def test_pool__that_is_left_early_ends() -> None:
    with DecodePool(1) as pool:
        stream = pool.stream(abs, range(-100, 0))
        assert next(stream) == 100
        stream.close()  # type: ignore[attr-defined]
