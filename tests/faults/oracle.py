"""What a gallery must hold: clients that remember every answer compare it with what is there.

In: answers of the service, as they come. Out: the state that each writer's items must be in: that
after its last acknowledged request, or after the one that was on its way, whole. Writers own
disjoint ids, so that nobody else's request matters to a writer's state.
"""

import base64
import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from tests.faults.served import NDJSON, Answer, Connection

COLOURS = ("red", "orange", "yellow", "green", "blue", "indigo", "violet", "grey")
POOL = 600  # ids of a writer: so few that one answer of at most 1000 neighbours reads all of them
SIMILAR = 1e-6  # float32 cosines that were summed in another order

Vector = NDArray[np.float32]
State = dict[str, "Stored"]  # in the order of the last writing


class Wrong(AssertionError):
    """The service holds what it must not hold, or lost what it acknowledged."""


@dataclass(frozen=True)
class Stored:
    """One item."""

    vector: Vector | None  # None: of a picture, whatever the encoder made of it
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One request that changes items."""

    what: str  # upsert, delete, delete by filter
    upserts: State = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)  # id -> file, of some upserts
    deletes: Sequence[str] = ()
    colour: str = ""
    writer: int = 0
    key: str | None = None  # Idempotency-Key

    def send(self, connection: Connection) -> Answer:
        headers = {} if self.key is None else {"idempotency-key": self.key}
        if self.what == "upsert":
            lines = [
                {
                    "id": item_id,
                    "metadata": item.metadata,
                    **(
                        {"image": base64.b64encode(self.pictures[item_id]).decode()}
                        if item.vector is None
                        else {"vector": item.vector.tolist()}
                    ),
                }
                for item_id, item in self.upserts.items()
            ]
            body = "\n".join(map(json.dumps, lines)).encode()
            return connection.ask("POST", "/items", body, kind=NDJSON, headers=headers)
        chosen = {"writer": self.writer, "colour": self.colour}
        deletion = {"filter": chosen} if self.colour else {"ids": list(self.deletes)}
        return connection.ask("POST", "/items/delete", deletion, headers=headers)

    def after(self, before: State) -> State:
        """What a state becomes."""
        state = dict(before)
        for item_id, item in self.upserts.items():
            state.pop(item_id, None)
            state[item_id] = item
        for item_id in self._gone(before):
            state.pop(item_id)
        return state

    def counts(self, before: State) -> dict[str, int]:
        """The numbers that its answer must hold."""
        if self.what == "upsert":
            updated = len(before.keys() & self.upserts.keys())
            return {"added": len(self.upserts) - updated, "updated": updated}
        return {"deleted": len(self._gone(before))}

    def _gone(self, before: State) -> list[str]:
        if self.colour:
            return [i for i, item in before.items() if item.metadata.get("colour") == self.colour]
        return [item_id for item_id in self.deletes if item_id in before]


class Writer:
    """One writer and all that it knows.

    Args:
        number: names its ids.
        state: its items at the start.
        pictures: files that items may come with.
        by_filter: whether the service deletes by filter.
    """

    def __init__(
        self,
        number: int,
        state: State,
        *,
        seed: str,
        dim: int,
        largest: int = 1024,
        pictures: Sequence[bytes] = (),
        by_filter: bool = False,
    ) -> None:
        self.number = number
        self.state = state
        self.on_its_way: Asked | None = None  # sent, not answered
        self.acknowledged: list[tuple[Asked, dict[str, Any]]] = []  # with a key, to be repeated
        self.answers = 0
        self.version = 0
        self._draw = random.Random(f"{seed} writer {number}")
        self._vectors = np.random.default_rng(self._draw.getrandbits(32))
        self.dim, self._largest = dim, largest
        self.by_filter = by_filter
        self._pictures = pictures
        self._asked = 0

    def work(self, connection: Connection) -> Answer:
        """One request and what is learned of its answer.

        Raises:
            OSError, HTTPException: there was no answer; `on_its_way` is the request.
            Wrong: the answer says what cannot be.
        """
        if self.acknowledged and self._draw.random() < 0.1:
            asked, wanted = self._draw.choice(self.acknowledged)
            answer = asked.send(connection)  # changes nothing, so it is never "on its way"
            if answer.status == 200 and answer.json() != wanted:
                raise Wrong(f"{asked.key} was answered {wanted}, now {answer.json()}")
            return answer
        self.on_its_way = self._next()
        answer = self.on_its_way.send(connection)
        self.learn(answer)
        return answer

    def repeat(self, connection: Connection) -> None:
        """Send what was on its way again, where a key makes that safe; then it is settled."""
        if self.on_its_way is not None and self.on_its_way.key is not None:
            self.learn(self.on_its_way.send(connection))

    def learn(self, answer: Answer) -> None:
        """Take note of the answer to what is on its way."""
        asked = self.on_its_way
        assert asked is not None
        if answer.status != 200:  # refused: nothing was changed
            if not 400 <= answer.status < 600 or answer.status == 500:
                raise Wrong(f"{asked.what} was answered {answer.status}: {answer.body[:500]!r}")
            self.on_its_way = None
            return
        said = answer.json()
        for name, count in asked.counts(self.state).items():
            if said[name] != count:
                raise Wrong(f"{asked.what} was answered {said}, wanted {name} = {count}")
        if said.get("rejected"):
            raise Wrong(f"rejected: {said['rejected']}")
        if said["gallery_version"] < self.version:
            raise Wrong(f"version {said['gallery_version']} after {self.version}")
        self.version = said["gallery_version"]
        self.state = asked.after(self.state)
        self.on_its_way = None
        self.answers += 1
        if asked.key is not None:
            self.acknowledged.append((asked, said))

    def settle(self, found: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Compare the items that are there, in their order, with what they may be.

        Returns:
            "as answered", or "one more" where the request on its way was done.
        """
        listed = list(found)
        outcomes = [("as answered", self.state)]
        if self.on_its_way is not None:
            outcomes.append(("one more", self.on_its_way.after(self.state)))
        for outcome, state in outcomes:
            if listed == [(item_id, item.metadata) for item_id, item in state.items()]:
                self.state, self.on_its_way = state, None
                return outcome
        there, wanted = dict(listed), outcomes[0][1]
        raise Wrong(
            f"writer {self.number}: {len(wanted.keys() - there.keys())} acknowledged items are "
            f"missing, {len(there.keys() - wanted.keys())} are there that were not acknowledged, "
            f"{sum(there[i] != wanted[i].metadata for i in there.keys() & wanted.keys())} have "
            f"other metadata; on its way was {self.on_its_way and self.on_its_way.what}"
        )

    def _next(self) -> Asked:
        self._asked += 1
        draw = self._draw
        key = f"key-{self.number}-{self._asked}" if draw.random() < 0.2 else None
        kind = draw.random()
        if kind < 0.15 and self.state:
            count = min(len(self.state), self._batch())
            ids = [*draw.sample(sorted(self.state), count), f"w{self.number}/nobody"]
            return Asked("delete", deletes=ids, key=key if self.by_filter else None)
        if kind < 0.2 and self.by_filter:
            colour = draw.choice(COLOURS)
            return Asked("delete by filter", colour=colour, writer=self.number, key=key)
        ids = draw.sample(range(POOL), min(POOL, self._batch()))
        rows = self._vectors.standard_normal((len(ids), self.dim))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        upserts: State = {}
        pictures = {}
        for place, row in zip(ids, rows, strict=True):
            item_id = f"w{self.number}/ü/{place}"
            metadata = {
                "writer": self.number,
                "colour": draw.choice(COLOURS),
                "stamp": self._asked,
                "text": "".join(draw.choices(string.printable, k=draw.randrange(20))),
            }
            vector: Vector | None = row
            if self._pictures and place < 8 and draw.random() < 0.5:
                vector, pictures[item_id] = None, draw.choice(self._pictures)
            upserts[item_id] = Stored(vector, metadata)
        return Asked("upsert", upserts, pictures, key=key)

    def _batch(self) -> int:
        """1 .. largest, small ones as often as large ones."""
        return int(self._largest ** self._draw.random())


def items_of(connection: Connection) -> list[tuple[str, dict[str, Any]]]:
    """Every item of a service, in its order, page by page."""
    found: list[tuple[str, dict[str, Any]]] = []
    cursor = ""
    while True:
        page = _ok(connection.ask("GET", f"/items?limit=1000{cursor}"))
        found += [(entry["id"], entry["metadata"]) for entry in page["items"]]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"


def check(connection: Connection, writers: Sequence[Writer], bundled: State) -> dict[str, int]:
    """Compare all that a service holds with what its writers know; then all of that is settled.

    Args:
        bundled: items that no writer changes: of the bundle's gallery.

    Raises:
        Wrong: lost, torn, back again, other bytes, or a search that is not brute force.
    """
    found = items_of(connection)
    seen = {"as answered": 0, "one more": 0}
    mine: dict[int, list[tuple[str, dict[str, Any]]]] = {w.number: [] for w in writers}
    others = []
    for item_id, metadata in found:
        if "writer" in metadata:
            mine[metadata["writer"]].append((item_id, metadata))
        else:
            others.append(item_id)
    if others != list(bundled):
        raise Wrong(f"of the bundle's items there are {others}")
    for writer in writers:
        seen[writer.settle(mine[writer.number])] += 1
        _check_vectors(connection, writer)
    for item_id, item in bundled.items():
        said = _ok(connection.ask("GET", f"/items/{quote(item_id)}?include=vector"))
        _same_vector(item_id, item.vector, said["vector"])
    _check_search(connection, [dict(bundled), *(writer.state for writer in writers)])
    version = _ok(connection.ask("GET", "/info"))["gallery"]["version"]
    if version < max(writer.version for writer in writers):
        raise Wrong(f"version {version} is older than an acknowledged one")
    return seen


def _check_vectors(connection: Connection, writer: Writer) -> None:
    """Read every vector of a writer with one search, which must be brute force too."""
    wanted = writer.state
    query = np.zeros(writer.dim, np.float32)
    query[writer.number % writer.dim] = 1
    body = {
        "vectors": [query.tolist()],
        "k": POOL,
        "filter": {"writer": writer.number},
        "include": ["metadata", "vector"],
        "exact": True,
    }
    (results,) = _ok(connection.ask("POST", "/neighbours", body))["results"]
    if {entry["id"] for entry in results} != wanted.keys() or len(results) != len(wanted):
        raise Wrong(f"a search among {len(wanted)} items finds {len(results)}")
    for entry in results:
        item = wanted[entry["id"]]
        if entry["metadata"] != item.metadata:
            raise Wrong(f"{entry['id']} has the metadata {entry['metadata']}, not {item.metadata}")
        if item.vector is None:  # of a picture: from now on it must not change
            learned = np.asarray(entry["vector"], np.float32)
            writer.state[entry["id"]] = Stored(learned, item.metadata)
        else:
            _same_vector(entry["id"], item.vector, entry["vector"])
    _check_order(query, results, {e["id"]: np.asarray(e["vector"], np.float32) for e in results})


def _check_search(connection: Connection, states: Sequence[State]) -> None:
    """The nearest of everything: as many as there are, and none that is nearer is left out."""
    vectors = {i: item.vector for state in states for i, item in state.items()}
    if not vectors:
        return
    query = np.asarray(next(reversed(vectors.values())))
    k = min(100, len(vectors))
    body = {"vectors": [query.tolist()], "k": k, "exact": True}
    (results,) = _ok(connection.ask("POST", "/neighbours", body))["results"]
    if len(results) != k:
        raise Wrong(f"{len(results)} neighbours of {k}")
    cosines = _check_order(query, results, vectors)
    left_out = [c for i, c in cosines.items() if i not in {entry["id"] for entry in results}]
    if left_out and max(left_out) > results[-1]["similarity"] + SIMILAR:
        raise Wrong(f"an item with {max(left_out)} was left out, the last is {results[-1]}")


def _check_order(
    query: Vector, results: Sequence[dict[str, Any]], vectors: dict[str, Any]
) -> dict[str, float]:
    ids = list(vectors)
    stacked = np.stack([vectors[i] for i in ids]).astype(np.float64) if ids else np.empty((0, 1))
    cosines = dict(
        zip(ids, (stacked @ query.astype(np.float64)).tolist() if ids else [], strict=True)
    )
    last = np.inf
    for entry in results:
        if abs(entry["similarity"] - cosines[entry["id"]]) > SIMILAR or entry["similarity"] > last:
            raise Wrong(f"{entry['id']}: {entry['similarity']}, by hand {cosines[entry['id']]}")
        last = entry["similarity"]
    return cosines


def _same_vector(item_id: str, wanted: Vector | None, got: Sequence[float]) -> None:
    assert wanted is not None
    if np.asarray(got, np.float32).tobytes() != wanted.tobytes():
        raise Wrong(f"{item_id} has another vector: {got}, wanted {wanted.tolist()}")


def _ok(answer: Answer) -> Any:
    if answer.status != 200:
        raise Wrong(f"answered {answer.status}: {answer.body[:500]!r}")
    return answer.json()
