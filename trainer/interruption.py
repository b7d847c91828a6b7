"""Ctrl-C and SIGTERM while training: the first asks for a stop, the second kills at once.

In: signals of this process. Out: a flag that the training loop reads between two steps.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

STANDARD_ERROR = 2
STOPPING = b"\nstopping: the state is saved after this step; a second Ctrl-C kills at once\n"


class Interrupted(Exception):
    """Training stopped because a signal asked for it, after its state was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM; `signum` is None until then."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for each in (signal.SIGINT, signal.SIGTERM):
            self._before[each] = signal.signal(each, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        # Straight to the descriptor: a handler may come in the middle of another write.
        os.write(STANDARD_ERROR, STOPPING)
