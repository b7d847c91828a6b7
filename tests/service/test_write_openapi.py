"""The checked-in OpenAPI document is the one of the routes."""

import json

from service.write_openapi import CHECKED_IN, document


def test_openapi__is_the_checked_in_one() -> None:
    assert CHECKED_IN.read_bytes() == document(), "run: python -m service.write_openapi"


def test_openapi__refers_only_to_shapes_it_has() -> None:
    text = document().decode()
    parsed = json.loads(text)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(parsed["components"]["schemas"])


def test_openapi__holds_the_routes_of_the_contract() -> None:
    paths = json.loads(document())["paths"]
    routes = {(method, path) for path, operations in paths.items() for method in operations}
    assert routes == {
        ("post", "/embed"),
        ("post", "/items"),
        ("get", "/items"),
        ("get", "/images/{item_id}"),
        ("get", "/items/{item_id}"),
        ("delete", "/items/{item_id}"),
        ("post", "/items/delete"),
        ("post", "/neighbours"),
        ("post", "/groups"),
        ("post", "/groupings"),
        ("get", "/groupings"),
        ("get", "/groupings/{grouping}"),
        ("get", "/groupings/{grouping}/groups"),
        ("get", "/groupings/{grouping}/groups/{group}"),
        ("get", "/map"),
        ("get", "/datasets"),
        ("post", "/evaluations"),
        ("get", "/evaluations"),
        ("get", "/evaluations/{evaluation}"),
        ("delete", "/evaluations/{evaluation}"),
        ("get", "/evaluations/{evaluation}/report"),
        ("get", "/evaluations/{evaluation}/events"),
        ("get", "/info"),
        ("get", "/livez"),
        ("get", "/readyz"),
        ("get", "/health"),
        ("get", "/metrics"),
        ("post", "/v1/embeddings"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{name}"),
        ("get", "/v2"),
        ("get", "/v2/health/live"),
        ("get", "/v2/health/ready"),
        ("get", "/v2/models/{name}"),
        ("get", "/v2/models/{name}/ready"),
        ("post", "/v2/models/{name}/infer"),
        ("get", "/v2/models/{name}/versions/{version}"),
        ("get", "/v2/models/{name}/versions/{version}/ready"),
        ("post", "/v2/models/{name}/versions/{version}/infer"),
    }
