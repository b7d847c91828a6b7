"""The answers that are kept for Idempotency-Keys, in memory as they stand in the log.

In: what the log holds, and what changes came to. Out: the answer of a request that is sent again.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import orjson

from service.gallery.protocol import Applied, Idempotency, IdempotencyConflict
from service.gallery.rows import Remembered


class KeptAnswers:
    """The answers; read from any thread, changed by the writer's alone.

    Args:
        ttl_s: how long a key is remembered.
        clock: seconds since 1970.
    """

    def __init__(self, *, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: dict[str, Remembered] = {}

    def load(self, entries: Iterable[Remembered]) -> None:
        """Hold these and no others."""
        self._kept = {entry.key: entry for entry in entries}

    def learn(self, entries: Iterable[Remembered]) -> None:
        """Hold what other processes have answered, too."""
        self._kept.update((entry.key, entry) for entry in entries)

    def recall(self, asked: Idempotency) -> Applied | None:
        """What the request of this key did, None when the key is new.

        Raises:
            IdempotencyConflict: the key stands for another request.
        """
        kept = self._kept.get(asked.key)
        if kept is None or kept.created_at < self.horizon():
            return None
        return recalled(kept, asked)

    def horizon(self) -> float:
        """What was answered before is forgotten; seconds since 1970."""
        return self._clock() - self._ttl_s

    def entry(self, key: Idempotency, done: Applied) -> Remembered:
        """What is to be kept of a request that was answered now."""
        answer = orjson.dumps(asdict(done))
        return Remembered(key.key, key.digest, answer, self._clock())

    def keep(self, fresh: Mapping[str, Remembered], horizon: float) -> None:
        """Add answers by their keys, and forget those before the horizon."""
        self._kept = {
            key: entry
            for key, entry in {**self._kept, **fresh}.items()
            if entry.created_at >= horizon
        }


def recalled(kept: Remembered, asked: Idempotency) -> Applied:
    """The answer of a request.

    Raises:
        IdempotencyConflict: the key stands for another request.
    """
    if kept.digest != asked.digest:
        raise IdempotencyConflict(asked.key)
    return applied_of(orjson.loads(kept.answer))


def applied_of(answer: Mapping[str, Any]) -> Applied:
    """An answer that was kept as JSON."""
    lists = {name: tuple(answer[name]) for name in ("missing", "rejected")}
    return Applied(**{**answer, **lists})
