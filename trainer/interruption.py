"""Ctrl-C and SIGTERM: while training the first asks for a stop, at other times for leaving at once;
the second kills.

Under torchrun, which passes signals on and so may send one twice, every later one is passed over:
torchrun itself kills what is left after 30 s.

In: signals of this process. Out: a flag that the training loop reads between two steps, or an
exception where there is no state to save.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

STANDARD_ERROR = 2
AGAIN_S = 0.05  # until a signal whose exception was passed over is sent once more
STOPPING = b"\nstopping: the state is saved after this step; a second Ctrl-C kills at once\n"
STOPPING_TOGETHER = b"\nstopping: the state is saved after this step\n"


class Interrupted(Exception):
    """Training stopped because a signal asked for it, after its state was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopAsked(Exception):
    """Something that takes long was given up, on all ranks, because one was asked to stop."""


class Terminated(KeyboardInterrupt):
    """SIGTERM where Ctrl-C would be a KeyboardInterrupt: what is half done is cleared away."""


@contextmanager
def terminable(*, alone: bool = True) -> Iterator[None]:
    """While entered, the first SIGTERM raises Terminated.

    Python passes over what is raised in a finaliser, and a signal may come while one runs: then the
    signal is sent once more.

    Args:
        alone: whether this process is the whole run; the second one kills at once then.
    """

    def receive(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL if alone else signal.SIG_IGN)
        raise Terminated

    def passed_over(problem: "sys.UnraisableHookArgs") -> None:
        if not issubclass(problem.exc_type, Terminated):
            hook_before(problem)
            return
        signal.signal(signal.SIGTERM, receive)
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.signal(signal.SIGTERM, receive)
    hook_before, sys.unraisablehook = sys.unraisablehook, passed_over
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM; `signum` is None until then.

    One that came too late for the loop to see is sent again on leaving.

    Args:
        alone: whether this process is the whole run.
        speaks: whether to tell the person at the terminal.
    """

    def __init__(self, *, alone: bool = True, speaks: bool = True) -> None:
        self._alone, self._speaks = alone, speaks
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
        if kind is None and self.signum is not None:
            signal.raise_signal(self.signum)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if not self._alone:
                return
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if not self._speaks:
            return
        # Straight to the descriptor: a handler may come in the middle of another write.
        os.write(STANDARD_ERROR, STOPPING if self._alone else STOPPING_TOGETHER)
