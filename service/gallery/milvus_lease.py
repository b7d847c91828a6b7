"""Which of the services on one Milvus collection writes to it: a lease in its facts.

In: a store, and the passing of time here. Out: whether we hold it. No two clocks are compared: the
holder counts up, and who has not seen it do so for LEASE_S may take its place. Milvus has no
compare-and-set, so this is no fence: a process that stands still for longer than LEASE_S between
`keep` and the end of its write may write beside its successor.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from service.gallery.milvus_facts import fact

if TYPE_CHECKING:
    from service.gallery.milvus import Store

LEASE_S = 6.0  # without a sign of life the holder is gone
KEEP_S = 1.5  # how often the holder counts up
SETTLE_S = 0.15  # two that take it at the same time see after so long who was last
_NAME = "writer"


class Lease:
    """The lease of one gallery; used by one thread at a time.

    Args:
        clock: monotonic seconds.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        store: "Store",
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._token = uuid.uuid4().hex
        self._name = f"{socket.gethostname()}, process {os.getpid()}"
        self._count = 0
        self._kept_at = 0.0
        self._seen: tuple[str, int] | None = None  # of the other holder: its token and count
        self._seen_at = 0.0
        self.holder = "unknown"
        self.is_held = False

    def take(self) -> bool:
        """Hold it if nobody does, or whoever did gives no sign of life any more.

        Raises:
            StorageError: Milvus is away.
        """
        if self.is_held and self.keep():
            return True
        found = self._read()
        if found is not None and found[0] != self._token:
            if found != self._seen:
                self._seen, self._seen_at = found, self._clock()
                return False
            if self._clock() - self._seen_at < LEASE_S:
                return False
        began = self._clock()
        self._write()
        self._sleep(SETTLE_S)
        return self._confirm(began)

    def keep(self) -> bool:
        """Whether we still hold it; says so to the others when it is time.

        Raises:
            StorageError: Milvus is away.
        """
        if not self.is_held:
            return False
        began = self._clock()
        if began - self._kept_at < KEEP_S:
            return True
        if not self._confirm(began):
            return False
        self._write()
        return True

    def release(self) -> None:
        """Let others have it.

        Raises:
            StorageError: Milvus is away; it ends by itself.
        """
        if self.is_held and self._confirm(self._clock()):
            self._store.delete(self._store.facts, f'name == "{_NAME}"')
        self.is_held = False

    def _confirm(self, at: float) -> bool:
        found = self._read()
        self.is_held = found is not None and found[0] == self._token
        if self.is_held:
            self._kept_at, self._seen = at, None
        return self.is_held

    def _read(self) -> tuple[str, int] | None:
        rows = self._store.query(self._store.facts, f'name == "{_NAME}"', ["value"])
        if not rows:
            return None
        given = orjson.loads(rows[0]["value"])
        self.holder = given["holder"]
        return given["token"], given["count"]

    def _write(self) -> None:
        self._count += 1
        value = {"token": self._token, "count": self._count, "holder": self._name}
        self._store.upsert(self._store.facts, [fact(_NAME, orjson.dumps(value).decode())])
