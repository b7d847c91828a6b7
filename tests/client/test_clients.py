"""The clients themselves, Client and AsyncClient alike (see conftest.py): URL, key, readiness, and
what holds whatever they ask for."""

import inspect
from typing import Any

import httpx2
import numpy as np
import pytest

from client import (
    AsyncClient,
    BodyTooLarge,
    Client,
    Limit,
    Readiness,
    RouteNotFound,
    UnexpectedAnswer,
    answers,
)
from tests.client.fake_answers import GROUPING, groups_of_each, neighbours_of_each


def test_info__the_facts(service: Any) -> None:
    info = service.info()
    assert (info.model, info.gallery_version) == ("m1", 7)
    assert info.limits["max_images"] == Limit(256, "max_images")
    assert (info.precision, info.speed) == ("int8", None)
    assert info.variants["int8"]["file"] == "encoder.int8.onnx"


def test_live__asks_once_and_no_answer_is_no(fake: Any, service: Any) -> None:
    fake.on("GET", "/livez", httpx2.Response(200, json={"status": "alive"}))
    assert service.live() is True
    fake.on("GET", "/livez", httpx2.Response(503))
    assert service.live() is False

    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    fake.on("GET", "/livez", refuse)
    assert service.live() is False
    assert fake.time.waits == []


def test_ready__names_what_is_missing(fake: Any, service: Any) -> None:
    checks = {"model": "ok", "gallery": "loading"}
    document = {"code": "not_ready", "status": 503, "detail": "gallery: loading"}
    fake.on("GET", "/readyz", httpx2.Response(503, json=document | {"checks": checks}))
    readiness = service.ready()
    assert not readiness
    assert readiness == Readiness("not_ready", checks)
    checks["gallery"] = "ok"
    fake.on("GET", "/readyz", httpx2.Response(200, json={"status": "ready", "checks": checks}))
    assert service.ready()
    assert fake.time.waits == []


def test_ready__no_answer_is_not_ready(fake: Any, service: Any) -> None:
    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    fake.on("GET", "/readyz", refuse)
    readiness = service.ready()
    assert not readiness
    assert "refused" in readiness.checks["connection"]


def test_ready__a_wrong_url_is_an_error(fake: Any, service: Any) -> None:
    fake.on("GET", "/readyz", httpx2.Response(404, json={"code": "not_found", "detail": "?"}))
    with pytest.raises(RouteNotFound):
        service.ready()


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(200, text="<html>"),
        httpx2.Response(200, json=[]),
        httpx2.Response(200, json={"id": "a", "vector": "x"}),
        httpx2.Response(301, headers={"Location": "https://fake/"}),
    ],
    ids=["html", "list", "nonsense", "redirect"],
)
def test_answers__that_are_not_this_api(fake: Any, service: Any, answer: httpx2.Response) -> None:
    fake.on("GET", "/items/a", answer)
    with pytest.raises(UnexpectedAnswer, match=r"GET /items/\{item_id\} is not what"):
        service.item("a")


def test_errors__reach_the_caller_by_code(fake: Any, service: Any) -> None:
    document = {"code": "body_too_large", "detail": "d", "limit": 5, "setting": "max_body_bytes"}
    fake.on("POST", "/embed", httpx2.Response(413, json=document))
    with pytest.raises(BodyTooLarge) as raised:
        service.embed(b"x")
    assert (raised.value.limit, raised.value.setting) == (5, "max_body_bytes")


def test_client__sends_its_key_and_keeps_the_prefix(fake: Any, connect: Any) -> None:
    fake.on("GET", "/prefix/items/a/b", httpx2.Response(200, json={"id": "a/b"}))
    assert connect("http://fake/prefix", api_key="secret").item("a/b").id == "a/b"
    assert fake.requests[-1].headers["authorization"] == "Bearer secret"
    assert fake.requests[-1].url.raw_path == b"/prefix/items/a%2Fb"


def test_client__without_a_key_sends_none(fake: Any, service: Any) -> None:
    service.info()
    assert "authorization" not in fake.requests[-1].headers


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://host:x"])
def test_client__a_url_that_is_none(connect: Any, url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        connect(url)


def test_client__both_kinds_have_the_same_methods_and_arguments() -> None:
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: [p.replace(annotation="") for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)


def test_vector__float32_and_none() -> None:
    assert answers.vector(None) is None
    assert answers.vector([1]).dtype == np.float32


def test_reads__name_the_gallery_version_that_they_must_see(fake: Any, service: Any) -> None:
    def page(request: httpx2.Request) -> httpx2.Response:
        after = None if "cursor" in request.url.params else "1"
        return httpx2.Response(200, json={"items": [], "next": after})

    webp = httpx2.Response(200, headers={"Content-Type": "image/webp"}, content=b"RIFF")
    map_of_none = {"model": "m1", "gallery_version": 7, "method": "pca", "state": "computing"}
    fake.on("GET", "/items", page)
    fake.on("GET", "/items/a", httpx2.Response(200, json={"id": "a", "metadata": {}}))
    fake.on("GET", "/images/a", webp)
    fake.on("POST", "/neighbours", neighbours_of_each)
    fake.on("POST", "/groups", groups_of_each)
    fake.on("POST", "/groupings", httpx2.Response(202, json=GROUPING))
    fake.on("GET", "/map", httpx2.Response(202, json=map_of_none))

    def ask(**least: int) -> list[str | None]:
        fake.requests.clear()
        list(service.items(**least))
        service.item("a", **least)
        service.image("a", **least)
        service.neighbours(ids="a", **least)
        service.groups(ids="a", **least)
        service.start_grouping(**least)
        service.map(**least)
        named = [r for r in fake.requests if r.url.path != "/info"]
        return [request.headers.get("X-Min-Gallery-Version") for request in named]

    assert ask(min_gallery_version=12) == ["12"] * 8
    assert ask() == [None] * 8
