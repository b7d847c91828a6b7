"""Items are added, listed, read and deleted; every id arrives as it is."""

import json
from typing import Any

import httpx2
import numpy as np
import pytest

from client import Added, Client, Deleted, Item, ItemNotFound, RejectedItem, UnexpectedAnswer
from tests.client.fake_answers import ADDED, lines_in


def test_add__pictures_with_ids_and_metadata(fake: Any, service: Any) -> None:
    fake.on("POST", "/items", httpx2.Response(200, json=ADDED))
    added = service.add([b"abc", b"d"], ids=["x/1", "ü"], metadata=[{"kind": "cat"}, None])
    assert added == Added("m1", 8, 1, 1, ())
    assert lines_in(fake.asked("/items")[0]) == [
        {"id": "x/1", "image": "YWJj", "metadata": {"kind": "cat"}},
        {"id": "ü", "image": "ZA=="},
    ]


def test_add__parts_are_summed_and_lines_counted_on(fake: Any, service: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        version = 8 + len(fake.asked("/items"))
        rejected = [{"id": lines_in(request)[0]["id"], "reason": "cut", "line": 1}]
        return httpx2.Response(
            200, json=ADDED | {"gallery_version": version, "updated": 0, "rejected": rejected}
        )

    fake.limits["max_images"] = 2
    fake.on("POST", "/items", handler)
    added = service.add((b"x" for _ in range(3)), ids=["a", "b", "c"])
    rejected = (RejectedItem("a", "cut", 1), RejectedItem("c", "cut", 3))
    assert added == Added("m1", 10, 2, 0, rejected)


def test_add__a_failure_half_way_tells_how_far_it_came(fake: Any, service: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        full = lines_in(request)[0]["id"] == "c"
        return httpx2.Response(507 if full else 200, json=ADDED)

    fake.limits["max_rows"] = 1
    fake.on("POST", "/items", handler)
    with pytest.raises(Exception, match="507") as raised:
        service.add(vectors=[[1], [2], [3]], ids=["a", "b", "c"])
    assert raised.value.__notes__ == [
        "2 items of this add() were answered before that; it may be repeated as it is"
    ]


def test_add__nothing(service: Any) -> None:
    with pytest.raises(ValueError, match="no items"):
        service.add([], ids=[])


def test_items__pages_are_followed_to_the_end(fake: Any, service: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        cursor = request.url.params.get("cursor")
        number = {None: 1, "c/=&1": 2, "c2": 3}[cursor]
        items = [{"id": f"i{number}", "metadata": {"n": number}}] if number != 2 else []
        page = {"items": items, "next": {1: "c/=&1", 2: "c2", 3: None}[number]}
        return httpx2.Response(200, json=page)

    fake.on("GET", "/items", handler)
    items = list(service.items(filter={"kind": ["a", "b"]}, page_size=1))
    assert items == [Item("i1", {"n": 1}), Item("i3", {"n": 3})]
    for request in fake.asked("/items"):
        assert json.loads(request.url.params["filter"]) == {"kind": ["a", "b"]}
        assert request.url.params["limit"] == "1"


def test_items__with_vectors(fake: Any, service: Any) -> None:
    item = {"id": "a", "metadata": {}, "vector": [1.0, 0.0]}
    fake.on("GET", "/items", httpx2.Response(200, json={"items": [item], "next": None}))
    (found,) = service.items(include_vectors=True)
    assert list(found.vector) == [1.0, 0.0]
    assert fake.asked("/items")[0].url.params["include"] == "vector"


def test_items__asks_for_a_page_only_when_it_is_needed(fake: Any) -> None:
    page = {"items": [{"id": "a", "metadata": {}}, {"id": "b", "metadata": {}}], "next": "c"}
    fake.on("GET", "/items", httpx2.Response(200, json=page))
    with Client("http://fake", transport=httpx2.MockTransport(fake)) as service:
        items = service.items()
        assert [next(items).id, next(items).id] == ["a", "b"]
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("item_id", "raw_path"),
    [
        ("a", b"/items/a"),
        ("cats/tom 1.png", b"/items/cats%2Ftom%201.png"),
        ("100%?#ü", b"/items/100%25%3F%23%C3%BC"),
        ("../x", b"/items/..%2Fx"),
        ("..", b"/items/%2E%2E"),
        (".", b"/items/%2E"),
        ("/abs", b"/items/%2Fabs"),
    ],
)
def test_item__any_id_arrives_as_it_is(
    fake: Any, service: Any, item_id: str, raw_path: bytes
) -> None:
    answer = {"id": item_id, "metadata": {"k": 1}, "vector": None}
    fake.on("GET", "/items/" + item_id, httpx2.Response(200, json=answer))
    assert service.item(item_id) == Item(item_id, {"k": 1})
    assert fake.requests[-1].url.raw_path == raw_path


def test_item__with_its_vector(fake: Any, service: Any) -> None:
    answer = {"id": "a", "metadata": {}, "vector": [0.6, 0.8]}
    fake.on("GET", "/items/a", httpx2.Response(200, json=answer))
    vector = service.item("a", include_vector=True).vector
    np.testing.assert_array_equal(vector, np.float32([0.6, 0.8]))
    assert dict(fake.requests[-1].url.params) == {"include": "vector"}


def test_item__without_id(service: Any) -> None:
    with pytest.raises(ValueError, match="at least one character"):
        service.item("")


def test_item__that_is_not_there(fake: Any, service: Any) -> None:
    fake.on("GET", "/items/a", httpx2.Response(404, json={"code": "item_not_found", "detail": "a"}))
    with pytest.raises(ItemNotFound):
        service.item("a")


def test_image__is_the_thumbnail(fake: Any, service: Any) -> None:
    webp = httpx2.Response(200, headers={"Content-Type": "image/webp"}, content=b"RIFF")
    fake.on("GET", "/images/a/b", webp)
    assert service.image("a/b") == b"RIFF"
    assert fake.requests[-1].url.raw_path == b"/images/a%2Fb"
    fake.on("GET", "/images/a/b", httpx2.Response(200, text="<html>"))
    with pytest.raises(UnexpectedAnswer, match="wanted an image"):
        service.image("a/b")


def test_delete__one(fake: Any, service: Any) -> None:
    answer = {"model": "m1", "gallery_version": 9, "deleted": 1, "missing": []}
    fake.on("DELETE", "/items/a/b", httpx2.Response(200, json=answer))
    assert service.delete("a/b") == Deleted("m1", 9, 1, ())


def test_delete_items__in_parts(fake: Any, service: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        ids = json.loads(request.content)["ids"]
        missing = [i for i in ids if i == "c"]
        counts = {"deleted": len(ids) - len(missing), "missing": missing}
        return httpx2.Response(200, json={"model": "m1", "gallery_version": 9, **counts})

    fake.limits["max_rows"] = 2
    fake.on("POST", "/items/delete", handler)
    assert service.delete_items(["a", "b", "c"]) == Deleted("m1", 9, 2, ("c",))
    assert fake.bodies("/items/delete") == [{"ids": ["a", "b"]}, {"ids": ["c"]}]
    with pytest.raises(ValueError, match="no ids"):
        service.delete_items([])
