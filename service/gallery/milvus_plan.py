"""What a change to a gallery in Milvus comes to, worked out before anything is written.

In: a change, and which of its ids are there. Out: rows to write, ids to delete, the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.gallery.protocol import Applied, Change, Item


class Plan:
    """One change.

    Args:
        present: the ids among those that it names that are there.
        seq: the last sequence number that was used.
    """

    def __init__(self, present: set[str], seq: int) -> None:
        self._present = present
        self.first = self.seq = seq
        self.upserts: dict[str, tuple[Item, int]] = {}
        self.gone: set[str] = set()
        self.added = self.updated = self.deleted = 0
        self._missing: list[str] = []
        self._rejected: Sequence[Mapping[str, Any]] = ()

    def add(self, change: Change, matching: Sequence[str] | None) -> None:
        """Work out a change; `matching` are the ids that its filter finds."""
        self._rejected = change.rejected
        for item in change.upserts:
            if item.id in self._present:
                self.updated += 1
            else:
                self.added += 1
                self._present.add(item.id)
            self.seq += 1
            self.upserts[item.id] = (item, self.seq)
        if matching is not None:
            self._present.update(matching)
        for item_id in change.deletes if matching is None else matching:
            if item_id not in self._present:
                self._missing.append(item_id)
                continue
            self.seq += 1
            self.deleted += 1
            self._present.remove(item_id)
            self.upserts.pop(item_id, None)
            self.gone.add(item_id)

    def applied(self) -> Applied:
        """The answer, its version still to be set."""
        counts = (self.added, self.updated, self.deleted)
        return Applied(self.seq, *counts, tuple(self._missing), tuple(self._rejected))
