"""Which parts of a call are on their way, which come next, and what is done when one fails.

In: client.retry.Together and how each part ended. Out: the next part to start. No threads and no
event loop: client.transport has both and runs these same decisions.
"""

from collections.abc import Callable
from typing import NamedTuple

from client.errors import ServiceError
from client.retry import Steps, Together

BUSY = 429  # the queue is full, or a rate is over: fewer at a time may get through


class Stopped(Exception):
    """How a part ends that is not gone on with because another one has failed."""


class Part(NamedTuple):
    """One part of a call."""

    number: int
    make: Callable[[], Steps[None]]  # once for each try


class Parallel:
    """The parts of one Together."""

    def __init__(self, together: Together) -> None:
        self._parts = together.parts
        self._room = together.at_once
        self._drawn = 0
        self._exhausted = False
        self._is_ahead = together.at_once > 1
        self._next: Part | None = None
        self._again: list[Part] = []
        self._flying: dict[int, Part] = {}
        self._alone: set[int] = set()  # started where there was room for one: refused is refused
        self._failures: dict[int, BaseException] = {}

    @property
    def flying(self) -> int:
        """How many are on their way."""
        return len(self._flying)

    @property
    def failure(self) -> BaseException | None:
        """What the first part that failed failed with."""
        return self._failures[min(self._failures)] if self._failures else None

    def draw(self) -> Part | None:
        """The next part to start; None when there is no room, no part left, or one has failed.

        Where there is no room the one after is made ready: its pictures are read while others are
        on their way, and it starts at once when one of them ends.
        """
        if len(self._flying) >= self._room:
            if self._is_ahead:
                self._make_ready()
            return None
        if self._failures:
            return None
        if self._again:
            return self._started(self._again.pop(0))
        self._make_ready()
        part, self._next = self._next, None
        return None if part is None else self._started(part)

    def ended(self, part: Part, error: BaseException | None) -> None:
        """Say how a part ended; one that found the service busy is drawn again, with less room."""
        del self._flying[part.number]
        if error is None or isinstance(error, Stopped):
            return
        beside_others = part.number not in self._alone
        if isinstance(error, ServiceError) and error.status == BUSY and beside_others:
            self._room = max(1, self._room // 2)
            self._again.append(part)
            self._again.sort()
        else:
            self._failures[part.number] = error

    def _make_ready(self) -> None:
        if self._next is not None or self._exhausted or self._failures:
            return
        try:
            make = next(self._parts, None)
        except Exception as error:  # noqa: BLE001 - a caller's iterable: thrown into the call below
            self._failures[self._drawn] = error
            return
        if make is None:
            self._exhausted = True
            return
        self._next = Part(self._drawn, make)
        self._drawn += 1

    def _started(self, part: Part) -> Part:
        self._flying[part.number] = part
        if self._room == 1:
            self._alone.add(part.number)
        return part
