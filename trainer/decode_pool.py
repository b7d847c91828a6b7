"""Spawned processes that decode pictures, and what they owe to the process that started them.

In: functions that can be imported by name, and items. Out: results in the order of the items,
whichever process was faster. What was lost with a process that died is done again elsewhere, or is
a DataError. No torch at import: the decoding processes import this.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self, TypeVar

from trainer.datasets import DataError

MAX_WORKERS = 16  # what "auto" takes at most: a disk rarely feeds more
PICTURE_LIMIT_S = 60  # a picture that takes longer is given up: real ones take tens of milliseconds

_is_decoding_process = False  # set once, when such a process begins

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodePool:
    """Spawned processes that decode; with `workers` = 0 everything happens in this one.

    Never forked: a fork after torch has started its threads may hang. And no future is ever
    cancelled: where a process dies before a cancelled one was dropped, CPython 3.11 fails to tell
    the others (python/cpython#107219), and who waits for them waits for ever.
    """

    def __init__(self, workers: int | Literal["auto"]) -> None:
        self.workers = _available_cores() if workers == "auto" else workers
        self._executor = self._start() if self.workers > 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[[Item], Result], item: Item) -> "Future[Result]":
        """Begin function(item); `function` must be importable by name. Without workers: do it."""
        if self._executor is not None:
            return self._executor.submit(function, item)
        done: Future[Result] = Future()
        done.set_result(function(item))
        return done

    def stream(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        rescue: Callable[[Item], Result] | None = None,
    ) -> Iterator[Result]:
        """Yield function(item) in the order of `items`, some of them computed ahead.

        Args:
            function: importable by name.
            rescue: called in this process for each item that was lost when a process died.

        Raises:
            DataError: a process died and there is no `rescue`.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[tuple[Item, Future[Result], ProcessPoolExecutor]] = deque()

        def begin(item: Item) -> None:
            assert self._executor is not None
            with named_death():
                try:
                    begun = self._executor.submit(function, item)
                except BrokenProcessPool:
                    if rescue is None:
                        raise
                    self._restart()
                    begun = self._executor.submit(function, item)
            waiting.append((item, begun, self._executor))

        def first() -> Result:
            item, future, executor = waiting.popleft()
            with named_death():
                try:
                    return future.result()
                except BrokenProcessPool:
                    if rescue is None:
                        raise
            if executor is self._executor:  # else it was replaced already
                self._restart()
            return rescue(item)

        for item in items:
            begin(item)
            if len(waiting) > 2 * self.workers:
                yield first()
        while waiting:
            yield first()

    def _restart(self) -> None:
        """Replace the executor, which refuses work once one of its processes has died."""
        assert self._executor is not None
        self._executor.shutdown(wait=True)
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=live_and_die_with_the_parent,
        )


@contextmanager
def named_death() -> Iterator[None]:
    """Say what the death of a decoding process may mean.

    Raises:
        DataError: instead of BrokenProcessPool.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a decoding process died: the machine was short of memory, or an image that could be "
            f"decoded when the run began hung for {PICTURE_LIMIT_S} s or brought its decoder down. "
            "Go on with --resume, with fewer data.workers if memory is short"
        ) from error


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Let the kernel kill this process, if it is a decoding one, after so long."""
    if not _is_decoding_process:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _available_cores() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def live_and_die_with_the_parent() -> None:
    """Out of reach of signals to the run's process group (torchrun's SIGTERM, Ctrl-C)."""
    global _is_decoding_process
    _is_decoding_process = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    threading.Thread(target=_follow_the_parent, daemon=True).start()


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only spawned processes come here
    parent.join()
    os._exit(1)
