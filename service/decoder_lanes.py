"""The order in which images are decoded: as they came, but large ones one at a time.

In: jobs, some of which turned out to be large. Out: the job that is next, for whoever is free.
"""

import math
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecodeJob:
    """An image that waits for a decoder."""

    image: bytes
    future: Future[Any]  # of Pixels, or of Pictured where asked for
    deadline: float  # on time.monotonic
    arrived: float
    sender: object  # jobs of one sender do not count as queueing before each other
    large: bool = False  # found to be so; it is running already in the eyes of its future
    thumbnail: bool = False  # wanted too
    last_start: float = math.inf  # of a large one behind those of others; refused after it


class Lanes:
    """Jobs in the order of their arrival; of the large ones only one is out at a time.

    May be used from any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[DecodeJob] = deque()
        self._large: deque[DecodeJob] = deque()
        self._large_out: DecodeJob | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs) + len(self._large)

    def put(self, job: DecodeJob) -> None:
        """Add a job, which goes behind those of its lane."""
        with self._changed:
            (self._large if job.large else self._jobs).append(job)
            self._changed.notify()

    def take(self) -> DecodeJob | None:
        """Wait for a job; None when the lanes are closed."""
        with self._changed:
            while not self._closed:
                large = None if self._large_out or not self._large else self._large[0]
                if large and (not self._jobs or large.arrived <= self._jobs[0].arrived):
                    self._large_out = self._large.popleft()
                    return self._large_out
                if self._jobs:
                    return self._jobs.popleft()
                self._changed.wait()
            return None

    def large_before(self, job: DecodeJob) -> tuple[int, bool]:
        """Large jobs of other senders that wait, and whether one of theirs is out."""
        with self._changed:
            out = self._large_out
            is_out = out is not None and out.sender is not job.sender
            return sum(other.sender is not job.sender for other in self._large), is_out

    def large_is_done(self) -> None:
        """The large job that was taken is settled: the next may go."""
        with self._changed:
            self._large_out = None
            self._changed.notify()

    def close(self) -> list[DecodeJob]:
        """End every `take`; gives what was left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [*self._jobs, *self._large]
            self._jobs.clear()
            self._large.clear()
            return left
