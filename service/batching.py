"""Micro-batches: images of many requests share one run of the encoder, nothing waits for company.

In: one prepared image at a time. Out: its row of the result. Bounded: what is admitted and not yet
answered is counted over all requests, and whoever comes on top is refused at once, as is who would
wait for longer than is any use. What was
cancelled or has passed its deadline is dropped before the encoder sees it.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")


class QueueFull(Exception):
    """More was asked for than the queue holds; `limit` is its size."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the queue of {limit} is full")
        self.limit = limit


class WaitTooLong(Exception):
    """Those who came before would take `expected_s`, longer than `limit_s`."""

    def __init__(self, expected_s: float, limit_s: float) -> None:
        super().__init__(f"about {expected_s:.1f} s of work wait, at most {limit_s:g} s may")
        self.expected_s = expected_s
        self.limit_s = limit_s


# How far back the speed is remembered, in seconds of work.
_REMEMBERED_S = 5.0
# An expected wait is believed once somebody has waited for this share of what is allowed: a burst
# on an idle service, whose speed with full batches nobody knows yet, is let in.
_EVIDENCE = 0.25


class _Throughput:
    """Rows answered in a second, measured only while there is work."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._busy_s = 0.0

    def count(self, rows: int, busy_s: float) -> None:
        kept = math.exp(-busy_s / _REMEMBERED_S)
        self._rows = self._rows * kept + rows
        self._busy_s = self._busy_s * kept + busy_s

    def seconds_for(self, rows: int) -> float:
        return rows * self._busy_s / self._rows if self._rows else 0.0


@dataclass
class _Waiting(Generic[Row, Result]):
    row: Row
    deadline: float
    arrived: float
    future: "asyncio.Future[Result]"


class Batcher(Generic[Row, Result]):
    """Collects rows into batches for `workers` threads; to be used from one event loop.

    Args:
        run: rows -> as many results; called in a thread, by `workers` of them at a time.
        max_batch: rows given to one call.
        queue_size: rows admitted and not yet answered.
        max_wait_s: rows are refused when those before them would take longer.
        workers: how many calls run at a time.
        on_batch: told the size, the seconds each row waited, and why the batch was let go:
            "full" (max_batch), "shared" (other idle workers take the rest) or "drained" (all that
            waited).
        clock: monotonic seconds; deadlines are on this clock.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Row]], Sequence[Result]],
        *,
        max_batch: int,
        queue_size: int,
        workers: int,
        max_wait_s: float = math.inf,
        on_batch: Callable[[int, Sequence[float], str], None] = lambda size, waits, reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._workers = workers
        self._on_batch = on_batch
        self._clock = clock
        self._max_wait_s = max_wait_s
        self._admitted = 0
        self._entries: dict[int, float] = {}  # admission -> when, the oldest first
        self._next_entry = 0
        self._throughput = _Throughput()
        self._measured = 0.0  # until when the throughput has counted
        self._idle = workers
        self._queue: deque[_Waiting[Row, Result]] = deque()
        self._arrived = asyncio.Event()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encoder")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def admitted(self) -> int:
        """Rows admitted and not yet answered."""
        return self._admitted

    @property
    def oldest_wait_s(self) -> float:
        """How long the row that comes next has waited; 0 when none waits."""
        return self._clock() - self._queue[0].arrived if self._queue else 0.0

    def start(self) -> None:
        """Begin to work; needs a running event loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def close(self) -> None:
        """Stop; rows still waiting are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiting in self._queue:
            waiting.future.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def check_room(self, count: int = 1) -> None:
        """Whether so many rows would be admitted now.

        Raises:
            QueueFull: so many places are not free.
            WaitTooLong: rows do wait, and those admitted would take longer than allowed.
        """
        if self._admitted + count > self._queue_size:
            raise QueueFull(self._queue_size)
        if self._entries:
            waited = self._clock() - next(iter(self._entries.values()))
            expected = self._throughput.seconds_for(self._admitted)
            if waited > _EVIDENCE * self._max_wait_s and expected > self._max_wait_s:
                raise WaitTooLong(expected, self._max_wait_s)

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Reserve `count` places for as long as the block runs.

        Raises:
            QueueFull, WaitTooLong: as `check_room`; nothing was reserved.
        """
        self.check_room(count)
        entry, now = self._next_entry, self._clock()
        self._next_entry += 1
        if not self._entries:
            self._measured = now  # idle until now
        self._entries[entry] = now
        self._admitted += count
        try:
            yield
        finally:
            now = self._clock()
            self._throughput.count(count, now - self._measured)
            self._measured = now
            del self._entries[entry]
            self._admitted -= count

    def submit(self, row: Row, deadline: float) -> "asyncio.Future[Result]":
        """Give one row to the next batch; call it under `admit` and await the result there.

        Its errors: TimeoutError when the deadline passed before its batch was run.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(row, deadline, self._clock(), future))
        self._arrived.set()
        return future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            now = self._clock()
            reason = "full" if len(batch) == self._max_batch else "drained"
            if reason == "drained" and self._queue:
                reason = "shared"
            self._on_batch(len(batch), [now - waiting.arrived for waiting in batch], reason)
            self._idle -= 1
            call = loop.run_in_executor(self._threads, self._run, [w.row for w in batch])
            try:
                await asyncio.wait([call])
            except asyncio.CancelledError:
                for waiting in batch:
                    waiting.future.cancel()
                raise
            finally:
                self._idle += 1
            error = call.exception()
            _settle(batch, call.result() if error is None else [error] * len(batch))

    def _take(self) -> list[_Waiting[Row, Result]]:
        """The next batch: an equal share for every idle worker, at most max_batch."""
        share = min(self._max_batch, -(-len(self._queue) // max(1, self._idle)))
        batch: list[_Waiting[Row, Result]] = []
        while self._queue and len(batch) < share:
            waiting = self._queue.popleft()
            if waiting.future.done():  # cancelled: its client is gone
                continue
            if waiting.deadline <= self._clock():
                waiting.future.set_exception(TimeoutError("waited too long for the encoder"))
                continue
            batch.append(waiting)
        return batch


def _settle(batch: Sequence[_Waiting[Any, Any]], outcomes: Sequence[Any]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.future.done():
            continue
        if isinstance(outcome, BaseException):
            waiting.future.set_exception(outcome)
        else:
            waiting.future.set_result(outcome)


class BoundedThreads:
    """A few threads for searches, parsing and encoding of answers, behind a bounded queue."""

    def __init__(
        self, workers: int, *, max_pending: int, initializer: Callable[[], None] | None = None
    ) -> None:
        self._threads = ThreadPoolExecutor(workers, "compute", initializer=initializer)
        self._max_pending = max_pending
        self._pending = 0

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function(*arguments)` in a thread.

        Raises:
            QueueFull: `max_pending` calls are waiting or running already.
        """
        if self._pending >= self._max_pending:
            raise QueueFull(self._max_pending)
        call = self._threads.submit(function, *arguments)
        self._pending += 1
        loop = asyncio.get_running_loop()
        # Counted until the thread is done with it, even when the request gave up before.
        call.add_done_callback(lambda _: _call_soon(loop, self._one_less))
        return await asyncio.wrap_future(call)

    def close(self) -> None:
        """Wait for what runs, drop what waits."""
        self._threads.shutdown(cancel_futures=True)

    def _one_less(self) -> None:
        self._pending -= 1


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop may be closed while a last thread ends
        loop.call_soon_threadsafe(callback)
