"""What the methods send and return, for Client and AsyncClient alike (see conftest.py)."""

import base64
import email.parser
import email.policy
import inspect
import io
import json
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from client import (
    Added,
    AsyncClient,
    BodyTooLarge,
    Client,
    Deleted,
    Embeddings,
    Group,
    Groups,
    ImageRejected,
    Item,
    ItemNotFound,
    Limit,
    Member,
    Neighbour,
    Neighbours,
    Readiness,
    Rejected,
    RejectedItem,
    RouteNotFound,
    UnexpectedAnswer,
    answers,
)


def images_in(request: httpx2.Request) -> list[bytes]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + request.content)
    return [part.get_payload(decode=True) for part in message.iter_parts()]


def npy(array: Any) -> httpx2.Response:
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32))
    headers = {"Content-Type": "application/x-npy", "X-Model-Id": "m1"}
    return httpx2.Response(200, headers=headers, content=file.getvalue())


def embed_digits(request: httpx2.Request) -> httpx2.Response:
    """Embeds b"7" as (7, 0)."""
    return npy([[float(content), 0] for content in images_in(request)])


def test_embed__rows_come_back_in_order_over_the_binary_body(fake: Any, service: Any) -> None:
    fake.on("POST", "/embed", embed_digits)
    found = service.embed([b"3", b"1", b"2"])
    assert (found.model, found.output, found.dim, found.errors) == ("m1", "embedding", 2, ())
    assert found.embeddings.dtype == np.float32
    np.testing.assert_array_equal(found.embeddings, [[3, 0], [1, 0], [2, 0]])
    (request,) = fake.asked("/embed")
    assert request.headers["accept"] == "application/x-npy"
    assert dict(request.url.params) == {"output": "embedding"}


def test_embed__one_picture_is_one_row(fake: Any, service: Any, tmp_path: Path) -> None:
    fake.on("POST", "/embed", embed_digits)
    (tmp_path / "a.png").write_bytes(b"5")
    np.testing.assert_array_equal(service.embed(tmp_path / "a.png").embeddings, [[5, 0]])


def test_embed__what_is_over_the_limits_is_sent_in_parts_and_joined(
    fake: Any, service: Any
) -> None:
    fake.limits["max_images"] = 2
    fake.on("POST", "/embed", embed_digits)
    found = service.embed(str(n).encode() for n in range(5))
    np.testing.assert_array_equal(found.embeddings[:, 0], range(5))
    assert [len(images_in(request)) for request in fake.asked("/embed")] == [2, 2, 1]


def test_embed__parts_stay_below_the_limit_of_bytes(fake: Any, service: Any) -> None:
    fake.limits["max_body_bytes"] = 5000
    fake.on("POST", "/embed", lambda r: npy([[len(i), 0] for i in images_in(r)]))
    sizes = [1500, 1500, 1500, 10, 4900, 10]
    found = service.embed([b"x" * size for size in sizes])
    assert list(found.embeddings[:, 0]) == sizes
    sent = [len(request.content) for request in fake.asked("/embed")]
    assert sorted(sent)[:-1] == [size for size in sorted(sent) if size <= 5000]  # one goes alone


def test_embed__limits_are_asked_for_once(fake: Any, service: Any) -> None:
    fake.on("POST", "/embed", embed_digits)
    service.embed(b"1")
    service.embed(b"2")
    assert len(fake.asked("/info")) == 1


def test_embed__a_prepared_batch_goes_as_it_is_in_parts(fake: Any, service: Any) -> None:
    batch = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    fake.limits["max_images"] = 2
    received: list[np.ndarray] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["content-type"] == "application/x-npy"
        received.append(np.load(io.BytesIO(request.content)))
        return npy(np.zeros((len(received[-1]), 2)))

    fake.on("POST", "/embed", handler)
    assert service.embed(batch).embeddings.shape == (3, 2)
    np.testing.assert_array_equal(np.concatenate(received), batch)
    assert [len(part) for part in received] == [2, 1]


def test_embed__features(fake: Any, service: Any) -> None:
    fake.on("POST", "/embed", npy([[1, 2, 3]]))
    assert service.embed(b"1", output="features").output == "features"
    assert dict(fake.asked("/embed")[0].url.params) == {"output": "features"}


def skip_x(request: httpx2.Request) -> httpx2.Response:
    images = images_in(request)
    errors = [{"index": i, "reason": "bad"} for i, image in enumerate(images) if image == b"x"]
    rows = [None if image == b"x" else [float(image), 0.0] for image in images]
    answer = {"model": "m1", "output": "embedding", "dim": 2, "embeddings": rows}
    return httpx2.Response(200, json=answer | ({"errors": errors} if errors else {}))


def test_embed__skipped_pictures_are_nan_and_counted_over_the_parts(
    fake: Any, service: Any
) -> None:
    fake.limits["max_images"] = 2
    fake.on("POST", "/embed", skip_x)
    found = service.embed([b"1", b"x", b"2", b"x", b"3"], on_error="skip")
    np.testing.assert_array_equal(
        found.embeddings, [[1, 0], [np.nan] * 2, [2, 0], [np.nan] * 2, [3, 0]]
    )
    assert found.errors == (Rejected(1, "bad"), Rejected(3, "bad"))
    assert fake.asked("/embed")[0].url.params["on_error"] == "skip"


def test_embed__without_numpy_lists_come_back(
    fake: Any, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.answers.numpy_is_there", lambda: False)
    monkeypatch.setattr("client.asking.numpy_is_there", lambda: False)
    fake.limits["max_images"] = 2
    fake.on("POST", "/embed", skip_x)
    found = service.embed([b"1", b"2", b"3"])
    assert found == Embeddings("m1", "embedding", 2, [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert fake.asked("/embed")[0].headers["accept"] == "application/json"
    assert service.embed([b"1", b"x"], on_error="skip").embeddings == [[1.0, 0.0], None]


def test_embed__rejected_pictures_are_numbered_as_the_caller_counts(
    fake: Any, service: Any
) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if b"x" not in images_in(request):
            return embed_digits(request)
        index = images_in(request).index(b"x")
        document = {"code": "image_rejected", "detail": "1 of 2 images rejected"}
        return httpx2.Response(422, json=document | {"errors": [{"index": index, "reason": "cut"}]})

    fake.limits["max_images"] = 2
    fake.on("POST", "/embed", handler)
    with pytest.raises(ImageRejected) as raised:
        service.embed([b"1", b"2", b"3", b"x"])
    assert raised.value.errors == (Rejected(3, "cut"),)


def test_embed__a_model_that_changes_between_the_parts_is_an_error(fake: Any, service: Any) -> None:
    models = iter(["m1", "m2"])

    def handler(_: httpx2.Request) -> httpx2.Response:
        response = npy([[1, 0]])
        response.headers["X-Model-Id"] = next(models)
        return response

    fake.limits["max_images"] = 1
    fake.on("POST", "/embed", handler)
    with pytest.raises(UnexpectedAnswer, match="model changed"):
        service.embed([b"1", b"2"])


@pytest.mark.parametrize("rows", [[[1, 0]], [1, 0]])
def test_embed__another_number_of_rows_than_pictures_is_an_error(
    fake: Any, service: Any, rows: Any
) -> None:
    fake.on("POST", "/embed", npy(rows))
    with pytest.raises(UnexpectedAnswer, match="for 2 images"):
        service.embed([b"1", b"2"])


def test_embed__wrong_arguments(service: Any) -> None:
    with pytest.raises(ValueError, match="no images"):
        service.embed([])
    with pytest.raises(ValueError, match="on_error must be"):
        service.embed(b"1", on_error="ignore")


ADDED = {"model": "m1", "gallery_version": 8, "added": 1, "updated": 1, "rejected": []}


def lines_in(request: httpx2.Request) -> list[dict[str, Any]]:
    assert request.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in request.content.splitlines()]


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


def neighbours_of_each(request: httpx2.Request) -> httpx2.Response:
    body = json.loads(request.content)
    queries = body.get("ids") or body.get("vectors") or body.get("images")
    results = [[{"id": f"near {query}", "similarity": 0.5}] for query in queries]
    head = {"model": "m1", "gallery_version": 7, "exact": True}
    return httpx2.Response(200, json=head | {"results": results})


def test_neighbours__by_ids(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    found = service.neighbours(ids=["a", "b"], k=3)
    results = ((Neighbour("near a", 0.5),), (Neighbour("near b", 0.5),))
    assert found == Neighbours("m1", 7, True, results)
    assert fake.bodies("/neighbours") == [{"ids": ["a", "b"], "k": 3}]


def test_neighbours__by_images_and_by_vectors(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    service.neighbours(images=[b"abc"])
    service.neighbours(vectors=np.float32([[0.5, 0.25]]))
    service.neighbours(vectors=[0.5, 0.25])
    assert fake.bodies("/neighbours") == [
        {"images": [base64.b64encode(b"abc").decode()], "k": 10},
        {"vectors": [[0.5, 0.25]], "k": 10},
        {"vectors": [[0.5, 0.25]], "k": 10},
    ]


def test_neighbours__options_are_sent_when_given(fake: Any, service: Any) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    service.neighbours(ids="a", filter={"kind": "cat"}, exact=False, include=["metadata", "vector"])
    assert fake.bodies("/neighbours") == [
        {
            "ids": ["a"],
            "k": 10,
            "filter": {"kind": "cat"},
            "exact": False,
            "include": ["metadata", "vector"],
        }
    ]


def test_neighbours__with_metadata_and_vector(fake: Any, service: Any) -> None:
    entry = {"id": "b", "similarity": 0.25, "metadata": {"x": 1}, "vector": [1.0, 0.0]}
    answer = {"model": "m1", "gallery_version": 7, "exact": True, "results": [[entry]]}
    fake.on("POST", "/neighbours", httpx2.Response(200, json=answer))
    ((found,),) = service.neighbours(ids="a", include=["metadata", "vector"]).results
    assert (found.id, found.similarity, found.metadata) == ("b", 0.25, {"x": 1})
    assert found.vector.dtype == np.float32


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"max_rows": 2}, [2, 2, 1]),
        ({"max_results": 30}, [3, 2]),  # of k = 10 each
        ({"max_results": 5}, [1, 1, 1, 1, 1]),  # the service says what it thinks of k
    ],
)
def test_neighbours__in_parts_and_in_order(
    fake: Any, service: Any, limits: dict[str, int], parts: list[int]
) -> None:
    fake.limits |= limits
    fake.on("POST", "/neighbours", neighbours_of_each)
    found = service.neighbours(ids=list("abcde"))
    assert [row[0].id for row in found.results] == [f"near {i}" for i in "abcde"]
    assert [len(body["ids"]) for body in fake.bodies("/neighbours")] == parts


@pytest.mark.parametrize("given", [{}, {"ids": ["a"], "vectors": [[1, 0]]}])
def test_neighbours__not_exactly_one_kind_of_query(service: Any, given: Any) -> None:
    with pytest.raises(ValueError, match="exactly one of images, vectors and ids; got"):
        service.neighbours(**given)


def test_neighbours__no_queries(service: Any) -> None:
    with pytest.raises(ValueError, match="got no ids"):
        service.neighbours(ids=[])


def groups_of_each(request: httpx2.Request) -> httpx2.Response:
    member = {"id": "b", "step": 1, "via": None, "similarity": 0.5}
    results = [
        {"members": [member | {"via": i}], "reached": 4, "truncated": True}
        for i in json.loads(request.content)["ids"]
    ]
    return httpx2.Response(200, json={"model": "m1", "gallery_version": 7, "results": results})


def test_groups__defaults_are_the_papers(fake: Any, service: Any) -> None:
    fake.on("POST", "/groups", groups_of_each)
    group = Group((Member("b", 1, "a", 0.5),), 4, True)
    assert service.groups(ids="a") == Groups("m1", 7, (group,))
    assert fake.bodies("/groups") == [
        {"ids": ["a"], "k": 4, "steps": 3, "order": "nearest", "limit": 200}
    ]


def test_groups__parts_stay_below_the_walks_of_one_request(fake: Any, service: Any) -> None:
    fake.limits["max_group_walk"] = 30  # k + k^2 with k = 3: 12 of each anchor
    fake.on("POST", "/groups", groups_of_each)
    found = service.groups(ids=list("abcde"), k=3, steps=2, order="hardest", limit=5)
    assert [group.members[0].via for group in found.results] == list("abcde")
    assert [len(body["ids"]) for body in fake.bodies("/groups")] == [2, 2, 1]


def test_groups__nonsense_is_left_to_the_service(fake: Any, service: Any) -> None:
    document = {"code": "invalid_request", "detail": "k: no"}
    fake.on("POST", "/groups", httpx2.Response(422, json=document))
    for k, steps in [(0, 3), (-1, 3), (4, 0), (4, 10**9)]:
        with pytest.raises(Exception, match="k: no"):
            service.groups(ids="a", k=k, steps=steps)


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


def test_neighbours__rejected_pictures_are_numbered_as_the_caller_counts(
    fake: Any, service: Any
) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        bad = base64.b64encode(b"x").decode()
        images = json.loads(request.content)["images"]
        if bad not in images:
            return neighbours_of_each(request)
        errors = [{"index": images.index(bad), "reason": "cut"}]
        document = {"code": "image_rejected", "detail": "1 rejected", "errors": errors}
        return httpx2.Response(422, json=document)

    fake.limits["max_images"] = 2
    fake.on("POST", "/neighbours", handler)
    with pytest.raises(ImageRejected) as raised:
        service.neighbours(images=[b"1", b"2", b"3", b"4", b"5", b"x"])
    assert raised.value.errors == (Rejected(5, "cut"),)


GROUPING = {
    "model": "m1", "id": "g1", "gallery_version": 7, "k": 4, "steps": 3, "min_size": 3,
    "state": "succeeded", "created_at": 1.0, "started_at": 2.0, "finished_at": 3.0, "items": 5,
    "grouped": 4, "ungrouped": 1, "groups": 2, "message": None, "error": None, "progress": None,
}  # fmt: skip


def test_groupings__are_asked_for_and_looked_at(fake: Any, service: Any) -> None:
    fake.on("POST", "/groupings", httpx2.Response(202, json=GROUPING | {"state": "queued"}))
    fake.on("GET", "/groupings", httpx2.Response(200, json={"items": [GROUPING], "next": None}))
    fake.on("GET", "/groupings/g1", httpx2.Response(200, json=GROUPING | {"sizes": [2, 2]}))
    assert service.start_grouping(k=5).state == "queued"
    (request,) = fake.asked("/groupings")
    assert json.loads(request.content) == {"k": 5, "steps": 3, "min_size": 3}
    (listed,) = service.groupings()
    assert (listed.items, listed.sizes) == (5, None)
    assert service.grouping("g1").sizes == (2, 2)


def test_groupings__pages_are_followed(fake: Any, service: Any) -> None:
    member = {"id": "a", "similarity": 0.5}
    group = {"group": 0, "size": 1, "representative": "a", "members": [member]}

    def paged(entry: dict[str, Any]) -> Any:
        def answer(request: httpx2.Request) -> httpx2.Response:
            after = None if "cursor" in request.url.params else "1"
            return httpx2.Response(200, json={"items": [entry], "next": after})

        return answer

    fake.on("GET", "/groupings/g1/groups", paged(group))
    fake.on("GET", "/groupings/g1/groups/3", paged(member))
    groups = list(service.grouping_groups("g1"))
    assert [(g.size, g.representative, g.members[0].id) for g in groups] == [(1, "a", "a")] * 2
    assert [m.similarity for m in service.grouping_members("g1", 3)] == [0.5, 0.5]


def test_map__comes_at_once_or_later(fake: Any, service: Any) -> None:
    facts = {"model": "m1", "gallery_version": 7, "method": "umap"}
    points = {"items": 9, "ids": ["a", "b"], "coordinates": [[0, 1], [2, 3]]}

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "version" in request.url.params:
            return httpx2.Response(200, json=facts | points)
        return httpx2.Response(202, json=facts | {"state": "computing"})

    fake.on("GET", "/map", answer)
    pending = service.map("umap", sample=2)
    assert (pending.gallery_version, pending.state) == (7, "computing")
    assert dict(fake.asked("/map")[0].url.params) == {"method": "umap", "sample": "2"}
    found = service.map("umap", version=pending.gallery_version)
    assert (found.items, found.ids) == (9, ("a", "b"))
    np.testing.assert_array_equal(found.coordinates, [[0, 1], [2, 3]])


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
