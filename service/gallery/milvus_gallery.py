"""A gallery in Milvus: many services read it, one of them at a time writes.

In: changes, and what another service has written. Out: snapshots. Milvus has no transactions and no
compare-and-set, so here is what holds: a change that was answered is in Milvus and seen by every
read from then on. One that was not answered may be there in part; sent again, it comes to the same
end. Sequence numbers are reserved before anything is written, so that none is used twice. Who
writes is agreed on by a lease (see milvus_lease); the others refuse changes and read on.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import structlog

from service.gallery.milvus_facts import (
    State,
    check_bound,
    describe,
    read_state,
    recall,
    remember,
    row_of,
    write_state,
)
from service.gallery.milvus_language import Index, any_of, expression_of
from service.gallery.milvus_lease import Lease
from service.gallery.milvus_plan import Plan
from service.gallery.milvus_snapshot import MilvusSnapshot
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryError,
    Idempotency,
    Item,
    PictureKind,
    Snapshot,
    StorageError,
    TooManyMatches,
)
from trainer.representation.bundle import BundleGallery

if TYPE_CHECKING:
    from service.gallery.milvus import Store

OPEN_WAIT_S = 120.0  # for another service that is filling the gallery
_LOOKUP = 4096  # ids asked for in one query

_Waiting = tuple[Change, "Future[Applied]"]
_log = structlog.get_logger("service.gallery")


def open_store(url: str) -> "Store":
    """Connect to the collections that a milvus:// URL names.

    Raises:
        GalleryError: the URL is none, Milvus is away, or pymilvus is not installed.
    """
    try:
        from service.gallery.milvus import Store  # an extra: most services have no Milvus
    except ImportError as error:
        raise GalleryError(
            "a gallery in Milvus wants pymilvus: install invprop[service,milvus]"
        ) from error
    try:
        return Store(url)
    except StorageError as error:
        raise GalleryError(str(error)) from error


class MilvusGallery:
    """Items in a Milvus collection, behind protocol.Gallery.

    Args:
        store: of the collections, made when missing; closed with this gallery.
        model_id: whose vectors these are.
        dim: numbers of a vector.
        imported: what a new collection begins with.
        index: how vectors are searched; fixed when the collection is made.
        whole_items: up to how many items groupings and maps go through.
        max_pending: changes that may wait.
        idempotency_ttl_s: how long a key is remembered.
        follow_interval_s: how often is looked at what another service has written.
        max_staleness_s: after so long without having seen Milvus there is trouble.
        clock: seconds since 1970.

    Raises:
        GalleryError: the collection is of another model, or cannot be used.
    """

    def __init__(
        self,
        store: "Store",
        *,
        model_id: str,
        dim: int,
        imported: Callable[[], BundleGallery],
        index: Index = "flat",
        whole_items: int = 50_000,
        max_pending: int = 256,
        idempotency_ttl_s: float = 86_400.0,
        follow_interval_s: float = 0.2,
        max_staleness_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model_id = model_id
        self.name = store.place.name
        self._store = store
        self._first = State(model_id, dim, index)
        self._imported = imported
        self._whole_items = whole_items
        self._ttl_ms = int(idempotency_ttl_s * 1000)
        self._follow_interval_s = follow_interval_s
        self._max_staleness_s = max_staleness_s
        self._clock = clock
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._queue: queue.Queue[_Waiting | str | None] = queue.Queue(max_pending)
        self._look_asked = threading.Event()
        self._failure: Exception | None = None
        self._unreachable: str | None = None
        self._uncounted = False  # a change broke off: what it left is counted before the next one
        try:
            store.make_facts()
            self._lease = Lease(store)
            self._state = self._open()
        except StorageError as error:
            store.close()
            raise GalleryError(str(error)) from error
        except BaseException:
            store.close()
            raise
        self._in_step_at = time.monotonic()
        self._writer = threading.Thread(target=self._work, name="milvus-writer", daemon=True)
        self._writer.start()

    @property
    def version(self) -> str:
        """Milvus and its version, for people."""
        return self._store.version

    @property
    def is_writer(self) -> bool:
        """Whether this service is the one that writes."""
        return self._lease.is_held

    def snapshot(self) -> MilvusSnapshot:
        """What is known to be acknowledged; see milvus_snapshot."""
        state = self._state
        return MilvusSnapshot(
            self._store,
            state.version,
            state.items,
            dim=state.dim,
            exact=state.index == "flat",
            whole_items=self._whole_items,
        )

    def recall(self, idempotency: Idempotency) -> Applied | None:
        """What the request of this key did, None when the key is new; asks Milvus."""
        return recall(self._store, idempotency, not_before_ms=self._now_ms() - self._ttl_ms)

    def apply(self, change: Change) -> "Future[Applied]":
        """Queue a change; see protocol.Gallery."""
        future: Future[Applied] = Future()
        self._queue.put_nowait((change, future))
        return future

    def picture(self, item_id: str, kind: PictureKind) -> bytes | None:
        """None: Milvus holds no pictures."""
        return None

    def staleness_s(self) -> float:
        """How long ago Milvus was last seen."""
        return time.monotonic() - self._in_step_at

    def trouble(self) -> str | None:
        """What keeps the gallery from being used as it should be; see protocol.Gallery."""
        if self._failure is not None:
            return f"failed: {self._failure}"
        if self._unreachable is not None:
            return f"Milvus is away: {self._unreachable}"
        if (stale_s := self.staleness_s()) > self._max_staleness_s:
            return f"Milvus was last seen {stale_s:.1f} s ago; see max_staleness_s"
        return None

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with every new snapshot; see protocol.Gallery."""
        self._listeners.append(listener)

    def refresh(self) -> None:
        """Look soon for what another service has written; see protocol.Gallery."""
        if not self._look_asked.is_set():
            self._look_asked.set()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait("look")

    def close(self) -> None:
        """Finish what is queued, let another service write, close the connection."""
        self._queue.put(None)
        self._writer.join()
        self._store.close()

    def _open(self) -> State:
        until = time.monotonic() + OPEN_WAIT_S
        waited = threading.Event()
        while True:
            state = read_state(self._store)
            if state is not None:
                check_bound(self._store, state, self.model_id, self._first.dim, self._first.index)
                if state.source:
                    raise GalleryError(
                        f"{self.name} is being filled from {state.source}: finish that with "
                        "python -m service.migrate"
                    )
                if state.ready:
                    self._store.make_items(state.dim, state.index, describe(self.model_id))
                    if self._lease.take():
                        state = self._taken_over(state)
                    return state
            elif self._store.has_items():
                raise GalleryError(
                    f"{self.name} is there, but {self._store.facts} does not say whose it is: no "
                    "gallery of this service, or its facts were dropped; give the URL of another "
                    "collection"
                )
            if self._lease.take():
                return self._begin()
            if time.monotonic() > until:
                raise GalleryError(
                    f"{self.name}: another service ({self._lease.holder}) has been filling it for "
                    f"{OPEN_WAIT_S:g} s; wait for it, and start again"
                )
            waited.wait(self._follow_interval_s)

    def _begin(self) -> State:
        """Fill a new collection with the bundle's gallery; begun anew where it was broken off."""
        write_state(self._store, self._first)
        self._store.make_items(self._first.dim, self._first.index, describe(self.model_id))
        gallery = self._imported()
        rows = [
            row_of(Item(item_id, vector, {}), seq)
            for seq, (item_id, vector) in enumerate(
                zip(gallery.ids, gallery.embeddings, strict=True), 1
            )
        ]
        self._store.upsert(self._store.items, rows)
        self._store.seal()
        state = replace(
            self._first, version=len(rows), reserved=len(rows), items=len(rows), ready=True
        )
        write_state(self._store, state)
        return state

    def _taken_over(self, state: State) -> State:
        """The state, where the one who wrote before may have broken off within a change."""
        if state.reserved == state.version:
            return state
        state = replace(state, version=state.reserved, items=self._store.count())
        write_state(self._store, state)
        return state

    # What follows runs in the writer thread.

    def _work(self) -> None:
        while True:
            try:
                entry = self._queue.get(timeout=self._follow_interval_s)
            except queue.Empty:
                entry = "look"
            if entry is None:
                break
            if isinstance(entry, str):
                self._look_asked.clear()
                self._look()
                continue
            change, future = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._written(change))
                except Exception as error:  # noqa: BLE001 - handed to the waiting request
                    future.set_exception(error)
        with contextlib.suppress(StorageError):  # it ends by itself where Milvus is away
            self._lease.release()

    def _look(self) -> None:
        """Stay the writer, or follow the one that is, or take its place."""
        try:
            seen_at = time.monotonic()
            if self._unreachable is not None:
                self._store.load()
            if self._lease.is_held and self._lease.keep():
                self._in_step_at, self._unreachable = seen_at, None
                return
            state = read_state(self._store)
            if state is None:
                raise GalleryError(f"{self._store.facts} no longer says what the gallery is")
            if self._lease.take():
                state = self._taken_over(read_state(self._store) or state)
            self._publish(state)
            self._in_step_at, self._unreachable = seen_at, None
        except StorageError as error:
            if self._unreachable is None:
                _log.warning("milvus_unreachable", cause=str(error))
            self._unreachable = str(error)
        except Exception as error:  # noqa: BLE001 - named by `trouble`; reads go on
            if self._failure is None:
                _log.error("gallery_failed", exc_info=error)
            self._failure = error

    def _publish(self, state: State) -> None:
        changed = state.version != self._state.version
        self._state = state
        if changed:
            for listener in self._listeners:
                listener(self.snapshot())

    def _written(self, change: Change) -> Applied:
        """Do a change; it is in Milvus when this returns.

        Raises:
            StorageError: another service writes, or Milvus is away: it may be there in part.
            IdempotencyConflict, TooManyMatches: nothing was changed.
        """
        if not self._lease.keep():
            raise StorageError(
                f"another service ({self._lease.holder}) writes to {self.name}, one at a time "
                "does; send changes there. This one takes its place when it is gone",
                full=False,
            )
        key = change.idempotency
        if key is not None and (done := self.recall(key)) is not None:
            return done
        state = self._state
        if self._uncounted:
            state = replace(state, items=self._store.count())
            self._uncounted = False
        plan = Plan(self._present(change), max(state.version, state.reserved))
        plan.add(change, self._deletes(change))
        if plan.seq > plan.first:
            state = self._store_plan(plan, state)
        applied = replace(plan.applied(), gallery_version=state.version)
        if key is not None:
            now = self._now_ms()
            remember(self._store, key, applied, at_ms=now, forget_before_ms=now - self._ttl_ms)
        self._publish(state)
        return applied

    def _store_plan(self, plan: Plan, state: State) -> State:
        state = replace(state, reserved=plan.seq)
        write_state(self._store, state)
        self._state = replace(self._state, reserved=plan.seq)
        self._uncounted = True
        self._store.upsert(self._store.items, [row_of(i, seq) for i, seq in plan.upserts.values()])
        gone = sorted(plan.gone)
        for start in range(0, len(gone), _LOOKUP):
            listed = any_of(gone[start : start + _LOOKUP])
            self._store.delete(self._store.items, f"id in {listed}")
        state = replace(state, version=plan.seq, items=state.items + plan.added - plan.deleted)
        write_state(self._store, state)
        self._uncounted = False
        return state

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _present(self, change: Change) -> set[str]:
        """Which of the ids that a change names are there."""
        ids = list({item.id for item in change.upserts} | set(change.deletes))
        found: set[str] = set()
        for start in range(0, len(ids), _LOOKUP):
            listed = any_of(ids[start : start + _LOOKUP])
            rows = self._store.query(self._store.items, f"id in {listed}", ["id"])
            found.update(str(row["id"]) for row in rows)
        return found

    def _deletes(self, change: Change) -> Sequence[str] | None:
        """The ids that a filter finds; None where there is none."""
        if change.delete_matching is None:
            return None
        expression = expression_of(change.delete_matching)
        count = self._store.count(expression)
        if count > change.most_matching:
            raise TooManyMatches(count)
        snapshot = self.snapshot()
        rows: list[int] = []
        after: int | None = 0
        while after is not None:
            page = snapshot.page(after=after, limit=_LOOKUP, where=change.delete_matching)
            rows += page.rows.tolist()
            after = page.next
        return [str(item_id) for item_id in snapshot.ids(np.asarray(rows, np.int64))]
