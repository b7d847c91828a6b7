"""What a picture is: its size and pixels, or the reason why it cannot be used.

In: some pictures together. Out: a finding for each; where decoding one kills or hangs the process,
`Examiner` finds out which, and that is its finding. No torch at import: the decoding processes
import this.
"""

import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from trainer.datasets import DataError, Picture, reduced_picture
from trainer.decode_pool import limited, live_and_die_with_the_parent
from trainer.representation.preprocess import ImageRejected


class Chunk(NamedTuple):
    """Pictures to examine together."""

    pictures: tuple[Picture, ...]
    size_px: int
    wants_pixels: bool
    limit_s: float  # for each


# Height, width and, where wanted, the reduced picture; or why it cannot be used.
Finding = tuple[tuple[int, int], NDArray[np.uint8] | None] | str


def examine(chunk: Chunk) -> list[Finding]:
    """A finding for each picture; one that takes too long ends the process that decodes."""
    return [_examine_one(picture, chunk) for picture in chunk.pictures]


def _examine_one(picture: Picture, chunk: Chunk) -> Finding:
    try:
        with limited(chunk.limit_s):
            image = reduced_picture(picture, chunk.size_px)
    except ImageRejected as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be opened: {error.strerror or error}"
    return (image.shape[0], image.shape[1]), image if chunk.wants_pixels else None


class Examiner:
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

    def examine(self, chunk: Chunk) -> list[Finding]:
        """As `examine`, with a reason for those on which the process died."""
        return [self._examine_one(chunk._replace(pictures=(one,))) for one in chunk.pictures]

    def _examine_one(self, chunk: Chunk) -> Finding:
        connection = self._connection or self._start()
        try:
            connection.send(chunk)
            finding: Finding = connection.recv()
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
    live_and_die_with_the_parent()
    connection.send("ready")
    while True:
        connection.send(examine(connection.recv())[0])


def _death(code: int | None, limit_s: float) -> str:
    if code == -signal.SIGALRM:
        return f"its decoder took more than {limit_s:g} s"
    if code is not None and code < 0:
        return f"its decoder process died ({signal.Signals(-code).name})"
    return f"its decoder process died (exit code {code})"
