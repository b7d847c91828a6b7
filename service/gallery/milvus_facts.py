"""What a Milvus collection is and what was answered: rows of the collection of facts beside it.

In: a store. Out: whose vectors it holds, its version, kept answers. A fact is one row under its
name; an answer is a few of them, named by the digest of the caller's key, which may hold anything.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from service.gallery.kept_answers import applied_of
from service.gallery.milvus_language import VALUE_BYTES, Index, terms_of
from service.gallery.protocol import Applied, GalleryError, Idempotency, IdempotencyConflict, Item

if TYPE_CHECKING:
    from service.gallery.milvus import Store

SCHEMA = "invprop.milvus/1"
_STATE = "gallery"
_PART_CHARACTERS = VALUE_BYTES // 4  # of an answer; a character is up to 4 bytes


@dataclass(frozen=True)
class State:
    """What the facts say of a gallery."""

    model_id: str
    dim: int
    index: Index
    version: int = 0  # of the last change that was answered
    reserved: int = 0  # no sequence number above it was used
    items: int = 0  # at that version
    ready: bool = False  # what it began with is all there
    source: str = ""  # what it is being filled from; a migration goes on where that is the same
    schema: str = SCHEMA


def read_state(store: "Store") -> State | None:
    """What the facts say; None where they say nothing yet.

    Raises:
        GalleryError: another version of this program wrote them.
    """
    rows = store.query(store.facts, f'name == "{_STATE}"', ["value"])
    if not rows:
        return None
    given = orjson.loads(rows[0]["value"])
    if given.get("schema") != SCHEMA:
        raise GalleryError(
            f"{store.place.name} has schema {given.get('schema')!r}, this version reads "
            f"{SCHEMA!r}; use the version of invprop that wrote it"
        )
    return State(**given)


def write_state(store: "Store", state: State) -> None:
    """Let the facts say this."""
    store.upsert(store.facts, [fact(_STATE, orjson.dumps(asdict(state)).decode())])


def check_bound(store: "Store", state: State, model_id: str, dim: int, index: Index) -> None:
    """Compare what a collection is with what is wanted of it.

    Raises:
        GalleryError: it is of another model, or under another index.
    """
    if (state.model_id, state.dim) != (model_id, dim):
        raise GalleryError(
            f"{store.place.name} holds vectors of model {state.model_id[:16]}... (dim "
            f"{state.dim}), but the bundle is model {model_id[:16]}... (dim {dim}): vectors of two "
            "models cannot be compared. Start with the bundle that belongs to this collection, or "
            "give the URL of another one"
        )
    if state.index != index:
        raise GalleryError(
            f"{store.place.name} was made with milvus_index = {state.index}, the setting is "
            f"{index}; set it to {state.index}, or move the gallery to a new collection with "
            "python -m service.migrate"
        )


def row_of(item: Item, seq: int) -> dict[str, Any]:
    """An item as Milvus holds it."""
    return {
        "id": item.id,
        "seq": seq,
        "metadata": dict(item.metadata),
        "terms": terms_of(item.metadata),
        "vector": np.ascontiguousarray(item.vector, np.float32),
    }


def describe(model_id: str) -> str:
    """What the collection's description says, for people."""
    return f"invprop gallery of model {model_id}"


def recall(store: "Store", asked: Idempotency, *, not_before_ms: int) -> Applied | None:
    """What the request of this key did; None where none is kept that is young enough.

    Raises:
        IdempotencyConflict: the key stands for another request.
    """
    wanted = f'owner == "{_owner(asked.key)}" and at_ms >= {not_before_ms}'
    parts = store.query(store.facts, wanted, ["name", "value"])
    if not parts:
        return None
    text = "".join(part["value"] for part in sorted(parts, key=lambda part: str(part["name"])))
    kept = orjson.loads(text)
    if kept["digest"] != asked.digest:
        raise IdempotencyConflict(asked.key)
    return applied_of(kept["answer"])


def remember(
    store: "Store", key: Idempotency, applied: Applied, *, at_ms: int, forget_before_ms: int
) -> None:
    """Keep an answer under its key, and forget the old ones."""
    text = orjson.dumps({"digest": key.digest, "answer": asdict(applied)}).decode()
    owner = _owner(key.key)
    rows = [
        fact(f"{owner}/{n:09d}", text[n : n + _PART_CHARACTERS], owner=owner, at_ms=at_ms)
        for n in range(0, len(text), _PART_CHARACTERS)
    ]
    store.delete(
        store.facts,
        f'owner == "{owner}" or (owner != "" and at_ms < {forget_before_ms})',
    )
    store.upsert(store.facts, rows)


def fact(name: str, value: str, *, owner: str = "", at_ms: int = 0) -> dict[str, Any]:
    """A row of the facts."""
    vector = np.zeros(2, np.float32)  # no collection is without
    return {"name": name, "owner": owner, "at_ms": at_ms, "value": value, "vector": vector}


def _owner(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
