"""Checkpoints written beside the training steps, one at a time.

In: the live state between two steps. Out: whole checkpoints, old ones removed. A step waits for the
copy of the state to the host and, where the disk is slower than training, for the write before;
hashes, disk and rename are the business of a thread. Memory: one extra copy of the state.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from trainer.checkpoint import (
    Capture,
    NotFiniteError,
    Progress,
    Retention,
    TrainingState,
    capture,
    checkpoint_path,
    checkpoints,
    is_whole,
    remove_old,
    write_checkpoint,
)
from trainer.progress import say
from trainer.representation.artifact import ArtifactError, open_artifact
from trainer.snapshot import HostCopies


class CheckpointNotWritten(Exception):
    """A checkpoint that is not there; the message names it, the reason and the last good one."""


@dataclass
class CheckpointWriter:
    """Writes below `directory`. Leaving its context waits until what was begun is whole."""

    directory: Path
    retention: Retention
    _copies: HostCopies = field(default_factory=HostCopies)
    _whole: set[Path] = field(default_factory=set)  # compared with their hashes by this process
    _begun: Path | None = None  # the last one
    _writing: "Future[None] | None" = None
    _told: bool = False  # of a failure

    def __post_init__(self) -> None:
        # A thread, not a process: what takes long (hashing, writing, synchronising) lets others
        # run Python meanwhile, and the copy of the state need not be sent anywhere.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()  # waits
        if self._told or not self.failed:
            return
        if kind is None:
            self.wait()
        say(f"besides, {self._failure()}")  # whoever caught `error` tells that one

    def save(
        self,
        state: TrainingState,
        progress: Progress,
        *,
        bank: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the state and begin to write it, once the write before is done.

        Where that failed nothing is begun: `failed` says so and `wait` tells.

        Args:
            bank: see `capture`.
        """
        path = checkpoint_path(self.directory, progress.position)
        if path == self._begun:
            return
        if self._failure() is None:
            captured = capture(state, progress, self._copies, bank=bank)
            self._writing = self._thread.submit(self._write, captured)
            self._begun = path

    def wait(self) -> Path | None:
        """Return when the checkpoint that was begun last is whole on disk, and where it is.

        Returns:
            None where none was begun.

        Raises:
            CheckpointNotWritten: it is not there.
        """
        failure = self._failure()
        if failure is not None:
            self._told = True
            raise failure
        return self._begun

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, which `wait` would say at once."""
        return self._writing is not None and self._writing.done() and self._failure() is not None

    def _failure(self) -> BaseException | None:
        return None if self._writing is None else self._writing.exception()  # waits

    def _write(self, captured: Capture) -> None:
        position = captured.position
        try:
            path = write_checkpoint(self.directory, captured)
            open_artifact(path)  # read back, before an older one is given up for it
            self._whole.add(path)
            remove_old(self.directory, self.retention, self._whole)
        except (OSError, ArtifactError, NotFiniteError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise CheckpointNotWritten(
                f"the checkpoint of epoch {position.epoch}, step {position.step} cannot be written "
                f"({reason or error}): {self._last_good()}. {_remedy(error, self.directory)}"
            ) from error

    def _last_good(self) -> str:
        for path in checkpoints(self.directory):
            if path in self._whole or is_whole(path):
                return f"the last good checkpoint is {path}"
        return "there is none yet"


def _remedy(error: Exception, directory: Path) -> str:
    if isinstance(error, NotFiniteError):
        return (
            "Nothing is published. Lower optim.lr, raise loss.temperature or use precision=fp32, "
            "in a new run"
        )
    return f"Make room in {directory.parent} or mend its disk, and go on with --resume"
