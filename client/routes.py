"""The service's routes as in its OpenAPI file, and how their paths and bodies are made.

In: ids and options. Out: Route and Request. What is asked and how the answer is read is said in
client.session, asking, gallery, groupings, evaluations and folders.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from client.bodies import JSON, to_json
from client.retry import IDEMPOTENCY_KEY, Request, Route

LIVE = Route("GET", "/livez")
READY = Route("GET", "/readyz")
INFO = Route("GET", "/info")
EMBED = Route("POST", "/embed")
ADD = Route("POST", "/items", repeatable=False)
LIST = Route("GET", "/items")
GET = Route("GET", "/items/{item_id}")
DELETE = Route("DELETE", "/items/{item_id}")
DELETE_MANY = Route("POST", "/items/delete")
IMAGE = Route("GET", "/images/{item_id}")
NEIGHBOURS = Route("POST", "/neighbours")
GROUPS = Route("POST", "/groups")
MAP = Route("GET", "/map")
START_GROUPING = Route("POST", "/groupings")
GROUPINGS = Route("GET", "/groupings")
GROUPING = Route("GET", "/groupings/{grouping}")
GROUPING_GROUPS = Route("GET", "/groupings/{grouping}/groups")
GROUPING_MEMBERS = Route("GET", "/groupings/{grouping}/groups/{group}")
DATASETS = Route("GET", "/datasets")
SUBMIT = Route("POST", "/evaluations", repeatable=False)
EVALUATIONS = Route("GET", "/evaluations")
EVALUATION = Route("GET", "/evaluations/{evaluation}")
CANCEL = Route("DELETE", "/evaluations/{evaluation}")
EVENTS = Route("GET", "/evaluations/{evaluation}/events")
ROUTES = (
    LIVE,
    READY,
    INFO,
    EMBED,
    ADD,
    LIST,
    GET,
    DELETE,
    DELETE_MANY,
    IMAGE,
    NEIGHBOURS,
    GROUPS,
    MAP,
    START_GROUPING,
    GROUPINGS,
    GROUPING,
    GROUPING_GROUPS,
    GROUPING_MEMBERS,
    DATASETS,
    SUBMIT,
    EVALUATIONS,
    EVALUATION,
    CANCEL,
    EVENTS,
)

Output: TypeAlias = Literal["embedding", "features"]
OnError: TypeAlias = Literal["raise", "skip"]
Include: TypeAlias = Literal["metadata", "vector"]
Order: TypeAlias = Literal["nearest", "hardest", "step"]
Protocol: TypeAlias = Literal[
    "knn", "linear_probe", "semi_supervised", "transfer", "voc07_svm", "detection"
]
Filter: TypeAlias = Mapping[str, Any]


MIN_GALLERY_VERSION = "X-Min-Gallery-Version"


def at_least(version: int | None) -> dict[str, str]:
    """The header of a read that must see this gallery version; none where any will do."""
    return {} if version is None else {MIN_GALLERY_VERSION: str(version)}


def json_request(
    route: Route,
    value: Mapping[str, Any],
    *,
    idempotency_key: str | None = None,
    min_gallery_version: int | None = None,
) -> Request:
    """A request with a JSON body, answered as JSON."""
    headers = {"Content-Type": JSON, "Accept": JSON, **at_least(min_gallery_version)}
    if idempotency_key is not None:
        headers[IDEMPOTENCY_KEY] = idempotency_key
    return Request(route, route.path, headers=headers, body=to_json(value))


def item_path(route: Route, item_id: str) -> str:
    """The path of one item; any id arrives as it is."""
    if not item_id:
        raise ValueError("an id has at least one character")
    # "." and ".." would be taken out of the URL on its way.
    name = item_id.replace(".", "%2E") if item_id in (".", "..") else quote(item_id, safe="")
    return route.path.replace("{item_id}", name)


def path_of(route: Route, **names: str) -> str:
    """The route's path with its parameters filled in."""
    path = route.path
    for name, value in names.items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    return path
