"""service.batching: no event loop is left waiting, nothing passes its bounds."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from service.batching import Batcher, BoundedThreads, QueueFull, WaitTooLong, _Throughput

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


async def hold(batcher: Batcher[int, int], gate: Gate) -> "asyncio.Future[int]":
    """Occupy the only worker with row 0."""
    first = batcher.submit(0, FAR)
    await asyncio.to_thread(gate.entered.wait, 30)
    return first


def test_batcher__answers_each_row_and_groups_what_waits() -> None:
    async def check() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        batcher.start()
        first = await hold(batcher, gate)
        others = [batcher.submit(row, FAR) for row in range(1, 7)]
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
        rows = [batcher.submit(row, FAR) for row in range(4)]
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
        late = batcher.submit(1, 5.0)
        good = batcher.submit(2, 7.0)
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
        gone = batcher.submit(1, FAR)
        good = batcher.submit(2, FAR)
        await asyncio.sleep(0)
        gone.cancel()
        gate.open.set()
        assert (await first, await good) == (0, 20)
        assert gate.batches == [[0], [2]]
        await batcher.close()

    run(check)


def test_batcher__says_why_a_batch_was_let_go_and_how_long_the_next_has_waited() -> None:
    async def check() -> None:
        gate, now, told = Gate(), [0.0], []
        batcher = batcher_of(
            gate,
            clock=lambda: now[0],
            on_batch=lambda size, waits, reason: told.append((size, waits, reason)),
        )
        batcher.start()
        first = await hold(batcher, gate)
        assert batcher.oldest_wait_s == 0
        now[0] = 1.0
        others = [batcher.submit(row, FAR) for row in range(1, 7)]
        now[0] = 3.5
        assert batcher.oldest_wait_s == 2.5
        gate.open.set()
        await asyncio.gather(first, *others)
        assert told == [(1, [0.0], "drained"), (4, [2.5] * 4, "full"), (2, [2.5] * 2, "drained")]
        await batcher.close()

        told.clear()
        pair = batcher_of(gate, workers=2, on_batch=lambda *told_of: told.append(told_of))
        pair.start()
        await asyncio.gather(*(pair.submit(row, FAR) for row in range(3)))
        assert [(size, reason) for size, _, reason in told] == [(2, "shared"), (1, "drained")]
        await pair.close()

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


def test_admit__refuses_who_would_wait_too_long_once_somebody_has_waited() -> None:
    now = [100.0]

    async def check() -> None:
        batcher = batcher_of(
            lambda rows: rows, queue_size=1000, max_wait_s=2.0, clock=lambda: now[0]
        )
        with batcher.admit(10):  # 10 rows in a second, idle before: the clock began at 100
            now[0] += 1.0
        now[0] += 50.0  # idle: this does not make it slower
        with contextlib.ExitStack() as held:
            held.enter_context(batcher.admit(15))
            batcher.check_room()  # 1.5 s of work
            held.enter_context(batcher.admit(10))  # a burst: 2.5 s of work, nobody has waited
            batcher.check_room()
            now[0] += 0.51
            with pytest.raises(WaitTooLong) as refused:
                batcher.check_room()
            assert refused.value.expected_s == pytest.approx(2.5)
            assert refused.value.limit_s == 2.0
            with pytest.raises(WaitTooLong), batcher.admit(1):
                raise AssertionError("admitted")
            assert batcher.admitted == 25
        batcher.check_room()  # nothing waits
        await batcher.close()

    run(check)


def test_throughput__follows_what_was_measured_last() -> None:
    throughput = _Throughput()
    assert throughput.seconds_for(10) == 0  # nothing is known
    throughput.count(100, 10.0)
    assert throughput.seconds_for(10) == pytest.approx(1.0)
    for _ in range(10):
        throughput.count(100, 5.0)  # twice as fast for ten times what is remembered
    assert throughput.seconds_for(10) == pytest.approx(0.5, rel=1e-3)


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
