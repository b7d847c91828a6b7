"""Answers of the service, read into the dataclasses of client.models.

In: an HTTP answer below 400. Out: a model, or UnexpectedAnswer where the answer is not this API's.
"""

import functools
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from client.bodies import NPY
from client.errors import Rejected, UnexpectedAnswer
from client.models import (
    Added,
    Array,
    Dataset,
    Deleted,
    Embeddings,
    Evaluation,
    Group,
    Grouping,
    GroupingMember,
    Info,
    Item,
    Json,
    Limit,
    ListedGroup,
    Map,
    Member,
    Neighbour,
    PendingMap,
    Readiness,
    RejectedItem,
)
from client.retry import Answer, Route


@functools.cache
def numpy_is_there() -> bool:
    """Whether numpy can be imported; it is imported when an answer needs it, not before."""
    return importlib.util.find_spec("numpy") is not None


@contextmanager
def reading(route: Route) -> Iterator[None]:
    """Turn what goes wrong while an answer is read into UnexpectedAnswer."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnexpectedAnswer(
            f"the answer to {route.method} {route.path} is not what this version of the client "
            f"expects ({type(error).__name__}: {error}): is the URL right, and the service as new "
            "as the client?"
        ) from error


def fields_of(answer: Answer) -> Json:
    """The members of a JSON object."""
    if 300 <= answer.status < 400:
        raise ValueError(f"redirected to {answer.headers.get('location')!r}: use that URL")
    return json_object(answer.body)


def json_object(text: str | bytes) -> Json:
    """The members of a JSON object."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise TypeError(f"got a JSON {type(fields).__name__}, wanted an object")
    return fields


def embeddings(answer: Answer, *, count: int, offset: int, output: str) -> Embeddings:
    """Read one part of embed(): `count` pictures, the first of which is the caller's `offset`th."""
    if answer.headers.get("content-type", "").startswith(NPY):
        import numpy as np

        rows = np.load(io.BytesIO(answer.body), allow_pickle=False)
        if rows.ndim != 2 or len(rows) != count:
            raise ValueError(f"got an array {rows.shape} for {count} images")
        return Embeddings(answer.headers["x-model-id"], output, rows.shape[1], rows)
    fields = fields_of(answer)
    dim, values = int(fields["dim"]), fields["embeddings"]
    if len(values) != count:
        raise ValueError(f"got {len(values)} embeddings for {count} images")
    errors = tuple(
        Rejected(int(error["index"]) + offset, str(error["reason"]))
        for error in fields.get("errors") or ()
    )
    if numpy_is_there():
        missing = [float("nan")] * dim
        values = vector([missing if row is None else row for row in values])
    return Embeddings(str(fields["model"]), str(fields["output"]), dim, values, errors)


def joined(parts: Sequence[Embeddings]) -> Embeddings:
    """The parts of one embed() in the caller's order."""
    first = parts[0]
    if any((part.model, part.dim) != (first.model, first.dim) for part in parts):
        raise ValueError("the service's model changed between the parts of one call: call again")
    if len(parts) == 1:
        return first
    if numpy_is_there():
        import numpy as np

        rows: Array = np.concatenate([part.embeddings for part in parts])
    else:
        rows = [row for part in parts for row in part.embeddings]
    errors = tuple(error for part in parts for error in part.errors)
    return Embeddings(first.model, first.output, first.dim, rows, errors)


def added(answer: Answer, *, offset: int) -> Added:
    """Read one part of add(), before which `offset` items were sent."""
    fields = fields_of(answer)
    return Added(
        model=str(fields["model"]),
        gallery_version=int(fields["gallery_version"]),
        added=int(fields["added"]),
        updated=int(fields["updated"]),
        rejected=tuple(
            RejectedItem(
                id=entry["id"],
                reason=str(entry["reason"]),
                line=None if entry.get("line") is None else int(entry["line"]) + offset,
            )
            for entry in fields["rejected"]
        ),
    )


def added_together(parts: Sequence[Added]) -> Added:
    """The parts of one add(); the version is the newest of them, in whatever order they came."""
    return Added(
        model=parts[-1].model,
        gallery_version=max(part.gallery_version for part in parts),
        added=sum(part.added for part in parts),
        updated=sum(part.updated for part in parts),
        rejected=tuple(rejected for part in parts for rejected in part.rejected),
    )


def deleted(answer: Answer) -> Deleted:
    """Read the answer to a deletion."""
    fields = fields_of(answer)
    return Deleted(
        model=str(fields["model"]),
        gallery_version=int(fields["gallery_version"]),
        deleted=int(fields["deleted"]),
        missing=tuple(fields["missing"]),
    )


def item(fields: Json) -> Item:
    """Read one item of the gallery."""
    return Item(str(fields["id"]), fields.get("metadata") or {}, vector(fields.get("vector")))


def neighbour(fields: Json) -> Neighbour:
    """Read one neighbour."""
    return Neighbour(
        id=str(fields["id"]),
        similarity=float(fields["similarity"]),
        metadata=fields.get("metadata"),
        vector=vector(fields.get("vector")),
    )


def group(fields: Json) -> Group:
    """Read what one anchor reached."""
    return Group(
        members=tuple(
            Member(
                str(member["id"]), int(member["step"]), member["via"], float(member["similarity"])
            )
            for member in fields["members"]
        ),
        reached=int(fields["reached"]),
        truncated=bool(fields["truncated"]),
    )


def grouping(fields: Json) -> Grouping:
    """Read one grouping."""
    known: dict[str, Any] = {name: fields.get(name) for name in Grouping.__dataclass_fields__}
    sizes = fields.get("sizes")
    known["sizes"] = None if sizes is None else tuple(int(size) for size in sizes)
    return Grouping(**known)


def grouping_member(fields: Json) -> GroupingMember:
    """Read one member of a group of a grouping."""
    return GroupingMember(str(fields["id"]), float(fields["similarity"]))


def listed_group(fields: Json) -> ListedGroup:
    """Read one group of a grouping."""
    return ListedGroup(
        group=int(fields["group"]),
        size=int(fields["size"]),
        representative=str(fields["representative"]),
        members=tuple(grouping_member(member) for member in fields["members"]),
    )


def map_or_pending(answer: Answer) -> Map | PendingMap:
    """Read /map, of status 200 or 202."""
    fields = fields_of(answer)
    model, version, method = str(fields["model"]), int(fields["gallery_version"]), fields["method"]
    if answer.status == 202:
        return PendingMap(model, version, str(method), str(fields["state"]))
    places = vector(fields["coordinates"])
    return Map(model, version, str(method), int(fields["items"]), tuple(fields["ids"]), places)


def readiness(answer: Answer) -> Readiness:
    """Read /readyz, of status 200 or 503."""
    fields = fields_of(answer)
    checks = {str(name): str(state) for name, state in fields["checks"].items()}
    # A service that is not ready answers with a problem: its code is the word, not the number.
    return Readiness(str(fields.get("code", fields["status"])), checks)


def info(fields: Json) -> Info:
    """Read /info."""
    limits: Mapping[str, Any] = fields["limits"]
    return Info(
        model=str(fields["model"]),
        gallery_version=int(fields["gallery_version"]),
        dims=fields["dims"],
        input=fields["input"],
        training=fields["training"],
        parity=fields["parity"],
        execution_provider=str(fields["execution_provider"]),
        # Services before these fields had fp32 alone.
        precision=str(fields.get("precision", "fp32")),
        variants=fields.get("variants", {}),
        speed=fields.get("speed"),
        search=fields["search"],
        gallery=fields["gallery"],
        limits={
            name: Limit(limit["limit"], str(limit["setting"])) for name, limit in limits.items()
        },
        versions=fields["versions"],
    )


def dataset(fields: Json) -> Dataset:
    """Read one labelled set."""
    known: dict[str, Any] = {name: fields.get(name) for name in Dataset.__dataclass_fields__}
    names = fields.get("class_names")
    known["class_names"] = None if names is None else tuple(map(str, names))
    return Dataset(**known)


def evaluation(fields: Json) -> Evaluation:
    """Read one evaluation; a service may leave out what it does not know yet."""
    known: dict[str, Any] = {name: fields.get(name) for name in Evaluation.__dataclass_fields__}
    known |= {"id": str(fields["id"]), "status": str(fields["status"])}
    return Evaluation(**known)


def vector(values: Any) -> Array | None:
    """A vector or a list of them: float32 where numpy is installed, as it came elsewhere."""
    if values is None or not numpy_is_there():
        return values
    import numpy as np

    return np.asarray(values, dtype=np.float32)
