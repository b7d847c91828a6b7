"""How images get from a source into memory: every file is decoded once before training.

In: an `ImageSource`. Out: the usable images, those that are skipped with their reason, and the
pixels from which training crops are taken, while they fit in memory (`trainer.stock` decodes the
others anew). Decoding runs in spawned processes; order never depends on them. A picture that kills
or hangs its decoder costs itself alone. No torch at import: the decoding processes import this.
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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.datasets import (
    DataError,
    ImageSource,
    Picture,
    Skipped,
    changed_meanwhile,
    prepared_picture,
    reduced_picture,
)
from trainer.representation.preprocess import ImageRejected, InputContract
from trainer.shared_block import BlockName, attach

EXAMINED_TOGETHER = 16  # files in one message to a process: some MB of pixels come back
MAX_WORKERS = 16  # what "auto" takes at most: a disk rarely feeds more
PICTURE_LIMIT_S = 60  # a picture that takes longer is given up: real ones take tens of milliseconds
NAMED_IN_ERRORS = 5  # skipped files that an error message names

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
            initializer=_live_and_die_with_the_parent,
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


@dataclass(frozen=True)
class Survey:
    """What the first pass over all images found."""

    source: ImageSource  # the N usable images; the fingerprint covers which were skipped
    skipped: tuple[Skipped, ...]
    sizes: NDArray[np.int32]  # (N, 2) heights and widths as `reduced_picture`
    stored: list[NDArray[np.uint8]] | None  # N x (h, w, 3) as `reduced_picture`; None: too large


class Part(NamedTuple):
    """Some rows of a batch, which a decoding process fills in."""

    block: BlockName
    shape: tuple[int, int, int]  # of the whole batch: B, H, W
    first: int  # row
    names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    sizes: tuple[tuple[int, int], ...]  # as the survey found them
    size_px: int  # side of the crops that are taken


def survey(
    source: ImageSource,
    pool: DecodePool,
    config: DataConfig,
    *,
    size_px: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Survey:
    """Decode every image once; find the unusable ones and store the others while they fit.

    A picture on which a decoding process dies, or that takes longer than PICTURE_LIMIT_S, is found
    by trying those that were lost one by one, and skipped. Without processes (data.workers=0)
    such a picture ends the run.

    Args:
        size_px: side of the crops that will be taken.
        advance: told how many images were done, for a progress bar.

    Raises:
        DataError: more than `config.max_skipped` of the images cannot be used.
    """
    usable: list[int] = []
    sizes: list[tuple[int, int]] = []
    skipped = list(source.skipped)
    # What nvJPEG decodes is not what is decoded here, so it decodes every batch.
    holds = config.resident_limit_bytes > 0 and config.decoder == "pillow"
    stored: list[NDArray[np.uint8]] | None = [] if holds else None
    stored_bytes = index = 0

    def chunks() -> Iterator[_Chunk]:
        for first in range(0, len(source), EXAMINED_TOGETHER):
            pictures = source.pictures[first : first + EXAMINED_TOGETHER]
            # Once they do not fit, pixels need not come back from the processes.
            yield _Chunk(tuple(pictures), size_px, stored is not None, PICTURE_LIMIT_S)

    with _Examiner() as alone:
        for results in pool.stream(_examine, chunks(), rescue=alone.examine):
            for result in results:
                if isinstance(result, str):
                    skipped.append(Skipped(source.ids[index], result))
                else:
                    usable.append(index)
                    size, pixels = result
                    sizes.append(size)
                    stored_bytes += 3 * size[0] * size[1]
                    if stored_bytes > config.resident_limit_bytes:
                        stored = None
                    if stored is not None:
                        assert pixels is not None  # they fitted when it was asked for
                        stored.append(pixels)
                index += 1
            advance(len(results))
    _check_skipped(skipped, len(source) + len(source.skipped), config.max_skipped)
    left_out = "\n".join(file.id for file in skipped)
    fingerprint = sha256(f"{source.fingerprint}\n{left_out}".encode()).hexdigest()
    kept = source if len(usable) == len(source) else source.subset(usable)
    return Survey(
        source=replace(kept, fingerprint=fingerprint),
        skipped=tuple(skipped),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        stored=stored,
    )


def fill(part: Part) -> None:
    """Decode the pictures of a part of a batch into their rows of the shared block.

    Each lies in the upper left corner of its row (H, W, 3); what is beside it stays as it was.

    Raises:
        DataError: a picture is no longer what the survey found.
    """
    count, height, width = part.shape
    memory = np.frombuffer(attach(part.block), np.uint8, count=count * height * width * 3)
    rows = memory.reshape(count, height, width, 3)[part.first :]
    for row, name, picture, size in zip(rows, part.names, part.pictures, part.sizes, strict=False):
        image = reduced_or_changed(name, picture, size, part.size_px)
        row[: size[0], : size[1]] = image


def reduced_or_changed(
    name: str, picture: Picture, size: tuple[int, int], size_px: int
) -> NDArray[np.uint8]:
    """(h, w, 3): `reduced_picture` of a picture that the survey found to have that size.

    Raises:
        DataError: it is damaged or of another size since.
    """
    try:
        with _limited(PICTURE_LIMIT_S):
            image = reduced_picture(picture, size_px)
    except (ImageRejected, OSError) as error:
        raise changed_meanwhile(name, error) from error
    if image.shape[:2] != tuple(size):
        found = f"{image.shape[0]} x {image.shape[1]} pixels instead of {size[0]} x {size[1]}"
        raise changed_meanwhile(name, ImageRejected(found))
    return image


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


def prepared_or_reasons(
    source: ImageSource, contract: InputContract, pool: DecodePool
) -> Iterator[NDArray[np.uint8] | str]:
    """For each image in order: (S, S, 3) as `ImageSource.prepared`, or why it cannot be used.

    A picture on which a decoding process dies or that takes too long is found as by `survey`.
    """
    function = functools.partial(_prepare_or_say, contract=contract)
    chunks = (
        tuple(source.pictures[first : first + EXAMINED_TOGETHER])
        for first in range(0, len(source), EXAMINED_TOGETHER)
    )
    with _Examiner() as alone:

        def rescue(pictures: tuple[Picture, ...]) -> list[NDArray[np.uint8] | str]:
            found = alone.examine(_Chunk(pictures, contract.size_px, False, PICTURE_LIMIT_S))
            return [
                finding if isinstance(finding, str) else function((picture,))[0]
                for picture, finding in zip(pictures, found, strict=True)
            ]

        if all(isinstance(picture, np.ndarray) for picture in source.pictures):
            for pictures in chunks:  # pixels in memory: sending them costs more than it saves
                yield from function(pictures)
            return
        for answers in pool.stream(function, chunks, rescue=rescue):
            yield from answers


def _prepare_or_say(
    pictures: tuple[Picture, ...], contract: InputContract
) -> list[NDArray[np.uint8] | str]:
    found: list[NDArray[np.uint8] | str] = []
    side = contract.size_px if contract.crop_fraction == 1 else -1
    whole = (side, side, 3)
    for picture in pictures:
        try:
            if isinstance(picture, np.ndarray) and picture.shape == whole:
                found.append(picture)  # what resizing it to its own size would give
                continue
            with _limited(PICTURE_LIMIT_S):
                found.append(prepared_picture(picture, contract))
        except ImageRejected as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"the file cannot be opened: {error.strerror or error}")
    return found


class _Chunk(NamedTuple):
    """Pictures to examine together."""

    pictures: tuple[Picture, ...]
    size_px: int
    wants_pixels: bool
    limit_s: float  # for each


# Height, width and, where wanted, the reduced picture; or why it cannot be used.
_Finding = tuple[tuple[int, int], NDArray[np.uint8] | None] | str


def _examine(chunk: _Chunk) -> list[_Finding]:
    return [_examine_one(picture, chunk) for picture in chunk.pictures]


def _examine_one(picture: Picture, chunk: _Chunk) -> _Finding:
    try:
        with _limited(chunk.limit_s):
            image = reduced_picture(picture, chunk.size_px)
    except ImageRejected as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be opened: {error.strerror or error}"
    return (image.shape[0], image.shape[1]), image if chunk.wants_pixels else None


class _Examiner:
    """One process that examines picture by picture, so that its death names the culprit."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._gone()

    def examine(self, chunk: _Chunk) -> list[_Finding]:
        """As `_examine`, with a reason for those on which the process died."""
        return [self._examine_one(chunk._replace(pictures=(one,))) for one in chunk.pictures]

    def _examine_one(self, chunk: _Chunk) -> _Finding:
        connection = self._connection or self._start()
        try:
            connection.send(chunk)
            finding: _Finding = connection.recv()
        except (EOFError, ConnectionError):
            return _death(self._gone(), chunk.limit_s)
        return finding

    def _start(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_examine_alone, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen when the process dies
        try:
            self._connection.recv()
        except EOFError as error:
            raise DataError(
                f"a decoding process does not start (exit code {self._gone()}): the machine may be "
                "short of memory; try fewer data.workers"
            ) from error
        return self._connection

    def _gone(self) -> int | None:
        assert self._process is not None
        assert self._connection is not None
        self._connection.close()
        self._process.join()
        code = self._process.exitcode
        self._process = self._connection = None
        return code


def _examine_alone(connection: Connection) -> None:
    _live_and_die_with_the_parent()
    connection.send("ready")
    while True:
        connection.send(_examine(connection.recv())[0])


def _death(code: int | None, limit_s: float) -> str:
    if code == -signal.SIGALRM:
        return f"its decoder took more than {limit_s:g} s"
    if code is not None and code < 0:
        return f"its decoder process died ({signal.Signals(-code).name})"
    return f"its decoder process died (exit code {code})"


@contextmanager
def _limited(limit_s: float) -> Iterator[None]:
    """Let the kernel kill this process, if it is a decoding one, after so long."""
    if not _is_decoding_process:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(part: ImageSource, contract: InputContract) -> NDArray[np.uint8]:
    return part.prepared(range(len(part)), contract)


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
