"""The client shares no code with the service: here its routes, fields and codes are compared with
the service's checked-in OpenAPI file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import client
from client import errors, routes

ROOT = Path(__file__).parents[2]
OPENAPI = json.loads((ROOT / "service" / "openapi.json").read_bytes())

# Dataclass -> the schema that it reads, and what it leaves out with a reason.
MODELS: dict[type, tuple[str, set[str]]] = {
    client.Embeddings: ("EmbedAnswer", set()),
    client.Added: ("ItemsAnswer", set()),
    client.Deleted: ("DeleteAnswer", set()),
    client.Item: ("ItemAnswer", {"model", "gallery_version"}),  # one dataclass for lists too
    client.Neighbour: ("Neighbour", set()),
    client.Neighbours: ("NeighboursAnswer", set()),
    client.Member: ("GroupMember", set()),
    client.Group: ("GroupAnswer", set()),
    client.Groups: ("GroupsAnswer", set()),
    client.Grouping: ("GroupingAnswer", set()),
    client.GroupingMember: ("GroupingMember", set()),
    client.ListedGroup: ("ListedGroup", set()),
    client.Map: ("MapAnswer", set()),
    client.PendingMap: ("MapPending", set()),
    client.Dataset: ("DatasetAnswer", set()),
    client.Evaluation: ("EvaluationAnswer", set()),
    client.Readiness: ("Readiness", set()),
    client.Limit: ("LimitInfo", set()),
    client.Info: ("InfoAnswer", set()),
    client.Rejected: ("RejectedImage", set()),
    client.RejectedItem: ("RejectedItem", set()),
}
# Routes for others than the client: an alias of /readyz, what Prometheus reads, what pages show.
# /v1 and /v2 are for the clients of two other APIs.
NOT_FOR_THE_CLIENT = {
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/evaluations/{evaluation}/report"),
}


def schema(name: str) -> Any:
    return OPENAPI["components"]["schemas"][name]


def test_routes__are_those_of_the_service() -> None:
    served = {(m.upper(), path) for path, methods in OPENAPI["paths"].items() for m in methods}
    called = {(route.method, route.path) for route in routes.ROUTES}
    ours = {(method, path) for method, path in served if not path.startswith(("/v1/", "/v2"))}
    assert called == ours - NOT_FOR_THE_CLIENT


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models__have_the_fields_of_their_schema(model: type) -> None:
    name, left_out = MODELS[model]
    fields = {field.name for field in dataclasses.fields(model)}
    assert fields == set(schema(name)["properties"]) - left_out


def test_models__every_dataclass_is_compared() -> None:
    public = {getattr(client, name) for name in client.__all__}
    # A field of a problem's `errors`, which the document leaves open.
    assert {kind for kind in public if dataclasses.is_dataclass(kind)} == {
        *MODELS,
        client.InvalidField,
        # The client's own.
        client.FolderAdded,
        client.RefusedFile,
    }


def test_listed_items__have_what_an_item_reads() -> None:
    assert {"id", "metadata", "vector"} == set(schema("ListedItem")["properties"])
    assert {"items", "next"} <= set(schema("ItemPage")["properties"])


@pytest.mark.parametrize(
    ("path", "method", "parameters"),
    [
        ("/embed", "post", {"output", "on_error"}),
        ("/items", "get", {"limit", "cursor", "filter", "include"}),
        ("/items", "post", {"idempotency-key"}),
        ("/items/{item_id}", "get", {"item_id", "include"}),
        ("/map", "get", {"method", "sample", "version"}),
    ],
)
def test_parameters__that_the_client_sends_exist(
    path: str, method: str, parameters: set[str]
) -> None:
    named = {p["name"].lower() for p in OPENAPI["paths"][path][method]["parameters"]}
    assert parameters <= named


def test_min_gallery_version__is_taken_by_the_reads_that_the_client_sends_it_with() -> None:
    """tests/client/test_clients.py says that the client sends it with these and no others."""
    taking = {
        (method.upper(), path)
        for path, methods in OPENAPI["paths"].items()
        for method, operation in methods.items()
        if any(p["name"] == routes.MIN_GALLERY_VERSION for p in operation.get("parameters", ()))
    }
    reads = (routes.LIST, routes.GET, routes.IMAGE, routes.NEIGHBOURS, routes.GROUPS)
    sent = (*reads, routes.START_GROUPING, routes.MAP)
    assert taking == {(route.method, route.path) for route in sent}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/neighbours", {"images", "vectors", "ids", "k", "filter", "exact", "include"}),
        ("/groups", {"images", "vectors", "ids", "k", "steps", "order", "limit"}),
        ("/groupings", {"k", "steps", "min_size"}),
        ("/items/delete", {"ids", "filter"}),
    ],
)
def test_bodies__have_the_fields_that_the_client_sends(path: str, fields: set[str]) -> None:
    content = OPENAPI["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    body = content["schema"]
    if "$ref" in body:
        body = schema(body["$ref"].rpartition("/")[2])
    assert fields == set(body["properties"])


def test_codes__are_those_of_the_service() -> None:
    from service.errors import PROBLEMS

    assert set(errors.BY_CODE) == set(PROBLEMS)


def test_limits__that_the_client_obeys_are_told_by_info() -> None:
    from service.routes.info import CLIENT_LIMITS

    obeyed = {"max_images", "max_rows", "max_body_bytes", "max_results", "max_group_walk"}
    assert obeyed <= set(CLIENT_LIMITS)
