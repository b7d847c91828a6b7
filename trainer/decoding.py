"""How images get from a source into memory: every file is decoded once before training.

In: an `ImageSource`. Out: the usable images, those that are skipped with their reason, and the
pixels from which training crops are taken, held in memory while they fit and decoded anew for each
batch where they do not. Decoding runs in spawned processes; order never depends on them.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from hashlib import sha256
from types import TracebackType
from typing import Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.datasets import (
    DataError,
    ImageSource,
    Picture,
    Skipped,
    changed_meanwhile,
    reduced_picture,
)
from trainer.representation.preprocess import ImageRejected, InputContract

EXAMINED_TOGETHER = 16  # files in one message to a process: some MB of pixels come back
MAX_WORKERS = 16  # what "auto" takes at most: a disk rarely feeds more
NAMED_IN_ERRORS = 5  # skipped files that an error message names

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodePool:
    """Spawned processes that decode; with `workers` = 0 everything happens in this one.

    Never forked: a fork after torch has started its threads may hang.
    """

    def __init__(self, workers: int | Literal["auto"]) -> None:
        self.workers = _available_cores() if workers == "auto" else workers
        self._executor: ProcessPoolExecutor | None = None
        if self.workers > 0:
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_live_and_die_with_the_parent,
            )

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

    def stream(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield function(item) in the order of `items`, some of them computed ahead.

        `function` must be importable by name. Closing the iterator drops what was not begun.

        Raises:
            DataError: a process died.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a decoding process died: the machine was short of memory, or an image brought its "
                "decoder down. Try data.workers=0 to see which, or fewer workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Survey:
    """What the first pass over all images found."""

    source: ImageSource  # the N usable images; the fingerprint covers which were skipped
    skipped: tuple[Skipped, ...]
    stored: list[NDArray[np.uint8]] | None  # N x (h, w, 3) as `reduced_picture`; None: too large


def survey(
    source: ImageSource,
    pool: DecodePool,
    config: DataConfig,
    *,
    size_px: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Survey:
    """Decode every image once; find the unusable ones and store the others while they fit.

    Args:
        size_px: side of the crops that will be taken.
        advance: told how many images were done, for a progress bar.

    Raises:
        DataError: more than `config.max_skipped` of the images cannot be used.
    """
    chunks = [
        source.pictures[first : first + EXAMINED_TOGETHER]
        for first in range(0, len(source), EXAMINED_TOGETHER)
    ]
    usable: list[int] = []
    skipped = list(source.skipped)
    stored: list[NDArray[np.uint8]] | None = []
    stored_bytes = index = 0
    for results in pool.stream(functools.partial(_examine, size_px=size_px), chunks):
        for result in results:
            if isinstance(result, str):
                skipped.append(Skipped(source.ids[index], result))
            else:
                usable.append(index)
                stored_bytes += result.nbytes
                if stored_bytes > config.resident_limit_bytes:
                    stored = None
                if stored is not None:
                    stored.append(result)
            index += 1
        advance(len(results))
    _check_skipped(skipped, len(source) + len(source.skipped), config.max_skipped)
    left_out = "\n".join(file.id for file in skipped)
    fingerprint = sha256(f"{source.fingerprint}\n{left_out}".encode()).hexdigest()
    kept = source if len(usable) == len(source) else source.subset(usable)
    return Survey(replace(kept, fingerprint=fingerprint), tuple(skipped), stored)


class CropStock:
    """The pixels that training crops are taken from, batch after batch."""

    def __init__(
        self,
        source: ImageSource,
        stored: Sequence[NDArray[np.uint8]] | None,
        pool: DecodePool,
        *,
        size_px: int,
    ) -> None:
        self._source, self._stored, self._pool, self._size_px = source, stored, pool, size_px

    def __len__(self) -> int:
        return len(self._source)

    @property
    def resident(self) -> bool:
        """Whether all pixels are in memory."""
        return self._stored is not None

    def batches(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[list[NDArray[np.uint8]]]:
        """Yield, for each (B,) array of positions, B images (h, w, 3) in that order."""
        if self._stored is not None:
            for indices in batches:
                yield [self._stored[i] for i in indices]
            return
        work = (
            [(self._source.ids[i], self._source.pictures[i]) for i in indices]
            for indices in batches
        )
        yield from self._pool.stream(functools.partial(_reduce, size_px=self._size_px), work)


def prepare_all(
    source: ImageSource, contract: InputContract, pool: DecodePool
) -> NDArray[np.uint8]:
    """(N, S, S, 3): what `ImageSource.prepared` gives for all images, decoded by the pool."""
    side = contract.size_px
    images = np.empty((len(source), side, side, 3), np.uint8)
    firsts = range(0, len(source), EXAMINED_TOGETHER)
    parts = (
        source.subset(range(first, min(first + EXAMINED_TOGETHER, len(source)))) for first in firsts
    )
    chunks = pool.stream(functools.partial(_prepare, contract=contract), parts)
    for first, prepared in zip(firsts, chunks, strict=True):
        images[first : first + len(prepared)] = prepared
    return images


def _examine(pictures: Sequence[Picture], size_px: int) -> list[NDArray[np.uint8] | str]:
    return [_reduced_or_reason(picture, size_px) for picture in pictures]


def _reduced_or_reason(picture: Picture, size_px: int) -> NDArray[np.uint8] | str:
    try:
        return reduced_picture(picture, size_px)
    except ImageRejected as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be opened: {error.strerror or error}"


def _prepare(part: ImageSource, contract: InputContract) -> NDArray[np.uint8]:
    return part.prepared(range(len(part)), contract)


def _reduce(work: Sequence[tuple[str, Picture]], size_px: int) -> list[NDArray[np.uint8]]:
    images = []
    for name, picture in work:
        try:
            images.append(reduced_picture(picture, size_px))
        except (ImageRejected, OSError) as error:
            raise changed_meanwhile(name, error) from error
    return images


def _check_skipped(skipped: Sequence[Skipped], found: int, allowed: float) -> None:
    if len(skipped) <= allowed * found:
        return
    named = "; ".join(f"{file.id}: {file.reason}" for file in skipped[:NAMED_IN_ERRORS])
    more = f"; and {len(skipped) - NAMED_IN_ERRORS} more" if len(skipped) > NAMED_IN_ERRORS else ""
    raise DataError(
        f"{len(skipped)} of {found} images cannot be used, more than the {allowed:.0%} that "
        f"data.max_skipped allows: {named}{more}. Repair or remove them, or raise data.max_skipped"
    )


def _available_cores() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _live_and_die_with_the_parent() -> None:
    """Out of reach of signals to the run's process group (torchrun's SIGTERM, Ctrl-C)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    threading.Thread(target=_follow_the_parent, daemon=True).start()


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only spawned processes come here
    parent.join()
    os._exit(1)
