"""How far a long call has come, for people. In: done and total. Out: a bar on a terminal, which is
drawn over itself; lines elsewhere.
"""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

LINE_EVERY_S = 5.0
BAR_EVERY_S = 0.1
BAR_WIDTH = 24


class Meter(Protocol):
    """What is told, any number of times, and closed at the end."""

    def __call__(self, done: int, total: int) -> None: ...

    def of(self, stage: str) -> None:
        """What is done from now on, where the work has stages."""

    def close(self) -> None: ...


def meter(what: str, *, file: TextIO | None = None) -> Meter:
    """A bar if `file` (stderr) is a terminal, else lines."""
    file = file or sys.stderr
    return Bar(what, file) if file.isatty() else Lines(what, file)


class Told:
    """What both kinds keep: `every_s` seconds at least between two pieces of text."""

    every_s: float

    def __init__(
        self, what: str, file: TextIO, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._file, self._monotonic = what, file, monotonic
        self._began = self._told_at = monotonic()
        self._stage = self._now = self._last = ""

    def __call__(self, done: int, total: int) -> None:
        self._now = self.line(done, total)
        if self._monotonic() - self._told_at >= self.every_s:
            self._tell()

    def of(self, stage: str) -> None:
        if stage != self._stage:
            self._stage, self._began = stage, self._monotonic()

    def line(self, done: int, total: int) -> str:
        """What there is to say."""
        stage = f"{self._stage}, " if self._stage else ""
        return f"{self._what}: {stage}{done:,}" + (f" of {total:,}" if total else "")

    def close(self) -> None:
        self._tell()

    def _tell(self) -> None:
        if self._now != self._last:
            self._write(self._now)
            self._file.flush()
        self._last, self._told_at = self._now, self._monotonic()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")


class Lines(Told):
    """A line every few seconds and one at the end."""

    every_s = LINE_EVERY_S


class Bar(Told):
    """One line that is drawn over itself: a bar, how much, how fast, how long it will take."""

    every_s = BAR_EVERY_S

    def line(self, done: int, total: int) -> str:
        said = super().line(done, total)
        took_s = self._monotonic() - self._began
        rate = done / took_s if took_s > 0 else 0.0
        if total:
            full = round(BAR_WIDTH * min(1.0, done / total))
            head, _, counts = said.rpartition(": ")
            said = f"{head} [{'=' * full}{' ' * (BAR_WIDTH - full)}] {counts}"
        if rate:
            said += f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.1f}/s"
            if total > done:
                said += f", {_clock((total - done) / rate)} left"
        return said

    def close(self) -> None:
        super().close()
        if self._last:
            self._file.write("\n")
            self._file.flush()

    def _write(self, line: str) -> None:
        # Cut to the terminal, or what is drawn over would be the last of several lines.
        self._file.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
