"""service.batching: no event loop is left waiting, nothing passes its bounds."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from service.batching import Batcher, BoundedThreads, QueueFull

FAR = float("inf")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def batcher_of(
    function: Callable[[Sequence[int]], Sequence[int]], **options: object
) -> Batcher[int, int]:
    defaults: dict[str, object] = {"max_batch": 4, "queue_size": 10, "workers": 1}
    return Batcher(function, **(defaults | options))  # type: ignore[arg-type]


class Gate:
    """An encoder that notes its batches and waits until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.batches.append(list(rows))
        self.entered.set()
        assert self.open.wait(30)
        return [10 * row for row in rows]


async def hold(batcher: Batcher[int, int], gate: Gate) -> "asyncio.Task[int]":
    """Occupy the only worker with row 0."""
    first = asyncio.create_task(batcher.submit(0, FAR))
    await asyncio.to_thread(gate.entered.wait, 30)
    return first


def test_batcher__answers_each_row_and_groups_what_waits() -> None:
    async def check() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        batcher.start()
        first = await hold(batcher, gate)
        others = [asyncio.create_task(batcher.submit(row, FAR)) for row in range(1, 7)]
        await asyncio.sleep(0)  # lets them queue
        gate.open.set()
        assert await asyncio.gather(first, *others) == [0, 10, 20, 30, 40, 50, 60]
        assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
        await batcher.close()

    run(check)


def test_batcher__shares_a_burst_between_idle_workers() -> None:
    async def check() -> None:
        gate = Gate()
        batcher = batcher_of(gate, workers=2)
        batcher.start()
        rows = [asyncio.create_task(batcher.submit(row, FAR)) for row in range(4)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*rows)
        assert sorted(gate.batches) == [[0, 1], [2, 3]]
        await batcher.close()

    run(check)


def test_batcher__drops_what_passed_its_deadline_before_the_encoder_sees_it() -> None:
    async def check() -> None:
        gate, now = Gate(), [0.0]
        batcher = batcher_of(gate, clock=lambda: now[0])
        batcher.start()
        first = await hold(batcher, gate)
        late = asyncio.create_task(batcher.submit(1, 5.0))
        good = asyncio.create_task(batcher.submit(2, 7.0))
        await asyncio.sleep(0)
        now[0] = 6.0
        gate.open.set()
        assert (await first, await good) == (0, 20)
        with pytest.raises(TimeoutError):
            await late
        assert gate.batches == [[0], [2]]
        await batcher.close()

    run(check)


def test_batcher__drops_what_was_cancelled() -> None:
    async def check() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        batcher.start()
        first = await hold(batcher, gate)
        gone = asyncio.create_task(batcher.submit(1, FAR))
        good = asyncio.create_task(batcher.submit(2, FAR))
        await asyncio.sleep(0)
        gone.cancel()
        gate.open.set()
        assert (await first, await good) == (0, 20)
        assert gate.batches == [[0], [2]]
        await batcher.close()

    run(check)


def test_admit__refuses_as_a_whole_what_does_not_fit() -> None:
    async def check() -> None:
        batcher = batcher_of(lambda rows: rows, queue_size=5)
        with batcher.admit(3):
            with pytest.raises(QueueFull) as full, batcher.admit(3):
                raise AssertionError("admitted 6 of 5")
            assert full.value.limit == 5
            with batcher.admit(2):
                assert batcher.admitted == 5
        assert batcher.admitted == 0
        await batcher.close()

    run(check)


def test_batcher__hands_an_error_to_every_row_of_the_batch_and_goes_on() -> None:
    def fails_on_one(rows: Sequence[int]) -> list[int]:
        if 1 in rows:
            raise ValueError("no ones")
        return list(rows)

    async def check() -> None:
        batcher = batcher_of(fails_on_one)
        batcher.start()
        outcomes = await asyncio.gather(
            batcher.submit(1, FAR), batcher.submit(2, FAR), return_exceptions=True
        )
        assert [str(outcome) for outcome in outcomes] == ["no ones", "no ones"]
        assert await batcher.submit(3, FAR) == 3
        await batcher.close()

    run(check)


def test_bounded_threads__refuses_more_than_may_wait_and_frees_places() -> None:
    async def check() -> None:
        threads = BoundedThreads(1, max_pending=2)
        gate = Gate()
        calls = [asyncio.create_task(threads.run(gate, [n])) for n in (1, 2)]
        await asyncio.to_thread(gate.entered.wait, 30)
        with pytest.raises(QueueFull):
            await threads.run(len, [])
        gate.open.set()
        assert await asyncio.gather(*calls) == [[10], [20]]
        while True:  # the places are given back by callbacks of the loop
            try:
                assert await threads.run(len, [1, 2, 3]) == 3
                break
            except QueueFull:
                await asyncio.sleep(0)
        threads.close()

    run(check)
