"""How far a long call has come, for people. In: done and total. Out: a bar on a terminal, with tqdm
where it is installed; lines elsewhere.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

LINE_EVERY_S = 5.0


class Meter(Protocol):
    """What is told, any number of times, and closed at the end."""

    def __call__(self, done: int, total: int) -> None: ...

    def close(self) -> None: ...


def meter(what: str, *, file: TextIO | None = None) -> Meter:
    """A bar if `file` (stderr) is a terminal and tqdm there, else lines."""
    file = file or sys.stderr
    if file.isatty():
        try:
            import tqdm
        except ImportError:
            return Lines(what, file)
        return Bar(tqdm.tqdm(desc=what, unit="file", file=file, dynamic_ncols=True))
    return Lines(what, file)


class Bar:
    """A tqdm bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total or None
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Lines:
    """A line every few seconds and one at the end."""

    def __init__(
        self, what: str, file: TextIO, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._file, self._monotonic = what, file, monotonic
        self._told_at = monotonic()
        self._last = ""
        self._now = ""

    def __call__(self, done: int, total: int) -> None:
        self._now = f"{self._what}: {done:,}" + (f" of {total:,}" if total else "")
        if self._monotonic() - self._told_at >= LINE_EVERY_S:
            self._say()

    def close(self) -> None:
        self._say()

    def _say(self) -> None:
        if self._now != self._last:
            self._file.write(self._now + "\n")
            self._file.flush()
        self._last, self._told_at = self._now, self._monotonic()
