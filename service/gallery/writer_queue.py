"""What waits for the writer thread of a gallery, and in which order it is taken.

In: changes of requests, replacements of the snapshot by one that holds the same items, and wishes
to look what others have written. Out: groups of changes that are written together.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from service.gallery.protocol import Applied, Change
from service.gallery.upkeep import Grown

# Requests written in one transaction: one synchronisation (about 7 ms) is shared by so many.
GROUP_REQUESTS = 64

Waiting = tuple[Change, "Future[Applied]"]
_Look = Literal["look"]  # for what others have written
_Replacing = tuple[Grown, "Future[None]"]  # of the snapshot, by one that holds the same items


class WriterQueue:
    """The queue; anyone puts, one thread takes.

    Args:
        max_pending: entries that may wait.
    """

    def __init__(self, max_pending: int) -> None:
        self._entries: queue.Queue[Waiting | _Replacing | _Look | None] = queue.Queue(max_pending)
        self._look_asked = threading.Event()

    def put(self, change: Change) -> "Future[Applied]":
        """Queue a change.

        Raises:
            queue.Full: `max_pending` wait.
        """
        future: Future[Applied] = Future()
        self._entries.put_nowait((change, future))
        return future

    def replace(self, grown: Grown, *, is_stopping: Callable[[], bool]) -> "Future[None]":
        """Have the writer apply a function to its snapshot; waits for room."""
        done: Future[None] = Future()
        while not is_stopping():
            with contextlib.suppress(queue.Full):
                self._entries.put((grown, done), timeout=0.2)
                break
        return done

    def look(self) -> None:
        """Have the writer look soon for what others have written."""
        if not self._look_asked.is_set():
            self._look_asked.set()
            # Where changes wait, the next one of them takes over what others have written.
            with contextlib.suppress(queue.Full):
                self._entries.put_nowait("look")

    def end(self) -> None:
        """Let the writer end after what is queued."""
        self._entries.put(None)

    def next_group(
        self, replace: Callable[[Grown], None], *, timeout_s: float | None
    ) -> list[Waiting] | None:
        """The next changes; none of them when it is time to look what others wrote; None: end.

        Args:
            replace: does what replaces the snapshot, which is done on the way.
            timeout_s: until it is time to look; None: only when somebody wants it.
        """
        try:
            first = self._next_entry(replace, timeout_s)
        except queue.Empty:
            self._look_asked.clear()  # whoever asks from here on is answered by the next round
            return []
        if first is None:
            return None
        group = [first]
        while len(group) < GROUP_REQUESTS:
            try:
                entry = self._next_entry(replace, 0)
            except queue.Empty:
                break
            if entry is None:
                self._entries.put(None)  # seen again after this group
                break
            group.append(entry)
        wanted = [entry for entry in group if entry[1].set_running_or_notify_cancel()]
        self._look_asked.clear()  # a group takes over what others have written, too
        return wanted

    def _next_entry(
        self, replace: Callable[[Grown], None], timeout_s: float | None
    ) -> Waiting | None:
        """The next change, None for the end.

        Raises:
            queue.Empty: nothing came in that time, or somebody wants a look at the log.
        """
        while True:
            entry = self._entries.get(block=timeout_s != 0, timeout=timeout_s or None)
            if entry == "look":
                raise queue.Empty
            if entry is None or isinstance(entry[0], Change):
                return entry
            grown, done = entry
            try:
                replace(grown)
            except Exception as error:  # noqa: BLE001 - handed to whoever asked for it
                done.set_exception(error)
            else:
                done.set_result(None)
