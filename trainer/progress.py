"""What a person sees while a run goes on: one bar on a terminal, plain lines elsewhere.

In: how many images are done, and figures to show. Out: text on standard error (the bar) and on
standard output (what stays).
"""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

PLAIN_LINE_EVERY_S = 30.0  # where there is no terminal: often enough to see that it lives


_muted = False


def mute() -> None:
    """Say and show nothing from now on: this process is not the first of its run."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Write a line that stays, above the bar if there is one."""
    if _muted:
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Counts images up to a total, showing their rate and the time left."""

    def __init__(self, what: str, total: int, *, done: int = 0) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._began = self._said = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty() and not _muted:
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit="img", unit_scale=True, leave=False
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int, what: str | None = None, figures: str = "") -> None:
        """Count images; `what` is being done from now on, `figures` stand beside it."""
        self._what = what or self._what
        self._done += images
        if self._bar is not None:
            self._bar.set_description(self._what, refresh=False)
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(images)
            return
        now = time.monotonic()
        if now - self._said >= PLAIN_LINE_EVERY_S:
            self._said = now
            rate = (self._done - self._first) / (now - self._began)
            left_s = (self._total - self._done) / rate if rate else float("inf")
            say(
                f"{self._what}: {self._done:,} of {self._total:,} images, {rate:.0f} images/s, "
                f"{left_s:.0f} s left{'; ' + figures if figures else ''}"
            )
