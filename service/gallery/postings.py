"""Which rows of a segment have which metadata: for each field and value the rows, in order.

In: the metadata of a segment, as bytes. Out: the rows that match a filter. A field is indexed when
somebody filters by it for the first time; from then on a filter looks at the matching rows alone.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from service.gallery.protocol import Filter, Rows
from service.gallery.records import Blobs

# Fields indexed at a time for one segment; the one that was used least recently goes.
MAX_FIELDS = 32


class _Field(NamedTuple):
    number_of: dict[Any, int]  # value -> its number
    rows: Rows  # the rows that have the field, by value, ascending within one
    starts: Rows  # (values + 1,): those of value n are rows[starts[n] : starts[n + 1]]


class Postings:
    """The indexed fields of one segment. Used by several threads."""

    def __init__(self, metadata: Blobs) -> None:
        self._metadata = metadata
        self._fields: dict[str, _Field] = {}  # the one used last at the end
        self._names: frozenset[str] | None = None  # of all fields; known after the first look
        self._lock = threading.Lock()

    def fields(self) -> list[str]:
        """The fields that are indexed."""
        with self._lock:
            return list(self._fields)

    def prepare(self, names: Iterable[str]) -> None:
        """Index these fields, so that the next filter by them does not wait."""
        for name in names:
            self._field(name)

    def matching(self, filter: Filter) -> Rows:
        """Rows whose metadata have, for each field, one of its values; ascending."""
        matches = [self._with(name, values) for name, values in filter.items()]
        matches.sort(key=len)
        found = matches[0]
        for other in matches[1:]:
            found = found[np.isin(found, other, assume_unique=True)]
        return found

    def _with(self, name: str, values: Sequence[Any]) -> Rows:
        field = self._field(name)
        numbers = set()
        for value in values:
            number = field.number_of.get(_typed(value))
            if number is not None:
                numbers.add(number)
        parts = [field.rows[field.starts[n] : field.starts[n + 1]] for n in numbers]
        if len(parts) == 1:
            return parts[0]
        return np.sort(np.concatenate([np.empty(0, np.int64), *parts]))

    def _field(self, name: str) -> _Field:
        with self._lock:
            field = self._fields.pop(name, None)
            if field is None:
                if self._names is not None and name not in self._names:
                    return _NO_FIELD
                field = self._index(name)
                if not len(field.rows):
                    return field
                if len(self._fields) >= MAX_FIELDS:
                    del self._fields[next(iter(self._fields))]
            self._fields[name] = field
            return field

    def _index(self, name: str) -> _Field:
        number_of: dict[Any, int] = {}
        names: set[str] = set()
        rows, numbers = [], []
        data, ends = self._metadata.data.tobytes(), self._metadata.ends.tolist()
        for row in range(len(self._metadata)):
            metadata = orjson.loads(data[ends[row] : ends[row + 1]])
            names.update(metadata)
            value = metadata.get(name, _ABSENT)
            if value is _ABSENT or isinstance(value, dict | list):
                continue  # a filter's values are scalars
            rows.append(row)
            numbers.append(number_of.setdefault(_typed(value), len(number_of)))
        self._names = frozenset(names)
        numbered = np.asarray(numbers, np.int64)
        order = np.argsort(numbered, kind="stable")
        starts = np.searchsorted(numbered[order], np.arange(len(number_of) + 1))
        return _Field(number_of, np.asarray(rows, np.int64)[order], starts)


_ABSENT = object()
_NO_FIELD = _Field({}, np.empty(0, np.int64), np.zeros(1, np.int64))


def _typed(value: Any) -> Any:
    """JSON's true is not 1, Python's is."""
    return (bool, value) if isinstance(value, bool) else value
