"""How far a long command is: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import TextIO

BAR = 30  # characters
ON_TERMINAL_S, ELSEWHERE_S = 0.2, 10.0


class Progress:
    """Says how many of `total` are done.

    Args:
        what: of what, in the plural.
        done: already, before this run.
        stream: where to.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, stream: TextIO = sys.stderr
    ) -> None:
        self._what, self._total, self._done, self._stream = what, total, done, stream
        self._is_terminal = stream.isatty()
        self._begun = self._said = time.monotonic()
        self._before = done

    def advance(self, count: int) -> None:
        """So many more."""
        self._done += count
        now = time.monotonic()
        if now - self._said >= (ON_TERMINAL_S if self._is_terminal else ELSEWHERE_S):
            self._said = now
            self._say("\r" if self._is_terminal else "", "" if self._is_terminal else "\n")

    def end(self) -> None:
        """Say it a last time."""
        self._say("\r" if self._is_terminal else "", "\n")

    def _say(self, before: str, after: str) -> None:
        took = max(time.monotonic() - self._begun, 1e-9)
        rate = (self._done - self._before) / took
        text = f"{self._done:,} of {self._total:,} {self._what}, {rate:,.0f}/s"
        if self._is_terminal:
            filled = round(BAR * self._done / max(self._total, 1))
            text = f"[{'#' * filled}{' ' * (BAR - filled)}] {text}   "
        self._stream.write(before + text + after)
        self._stream.flush()
