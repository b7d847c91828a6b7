"""/items: what goes in comes out, what cannot go in is named."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Picture = Callable[..., bytes]
NDJSON = {"Content-Type": "application/x-ndjson"}


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


def ndjson(*lines: Any) -> bytes:
    return b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)


def unit(axis: int) -> list[float]:
    return [1.0 if n == axis else 0.0 for n in range(12)]


def test_items__multipart_takes_file_names_as_ids(service: Any, picture: Picture) -> None:
    client, image = service.client, picture(1)
    parts = [("images", ("dir/ä.png", image)), ("images", ("train/0003.png", picture(2)))]
    metadata = json.dumps([{"label": "x"}, {"n": [1, {"deep": None}]}])
    answer = client.post("/items", files=parts, data={"metadata": metadata}).json()
    assert answer == {
        "model": service.bundle.model_id,
        "gallery_version": 42,
        "added": 1,
        "updated": 1,
        "rejected": [],
    }
    document = client.get("/items/dir/ä.png?include=vector").json()
    assert (document["id"], document["metadata"]) == ("dir/ä.png", {"label": "x"})
    np.testing.assert_allclose(document["vector"], service.embedding(image), atol=1e-6)
    assert client.get("/items/train%2F0003.png").json()["metadata"] == {"n": [1, {"deep": None}]}


def test_items__metadata_may_come_as_a_file(service: Any, picture: Picture) -> None:
    parts = [("images", ("a", picture())), ("metadata", ("m.json", b'[{"from": "file"}]'))]
    assert service.client.post("/items", files=parts).status_code == 200
    assert service.client.get("/items/a").json()["metadata"] == {"from": "file"}


def test_items__ndjson_takes_images_and_vectors(service: Any, picture: Picture) -> None:
    image = picture(3)
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    body = ndjson(
        {"id": "image", "image": uri},
        b"",
        {"id": "vector", "vector": [2.0, *[0] * 11], "metadata": {"a": 1}},
        {"id": "own", "vector": unit(1), "model": service.bundle.model_id},
    )
    answer = service.client.post("/items", content=body, headers=NDJSON).json()
    assert (answer["added"], answer["rejected"]) == (3, [])
    get = service.client.get
    np.testing.assert_allclose(
        get("/items/image?include=vector").json()["vector"], service.embedding(image), atol=1e-6
    )
    assert get("/items/vector?include=vector").json()["vector"] == unit(0)


def test_items__one_bad_line_does_not_cost_the_others(service: Any) -> None:
    body = ndjson(
        {"id": "good", "vector": unit(0)},
        b"{no json",
        {"id": "two", "vector": [1, 2]},
        {"id": "none"},
        {"id": "both", "vector": unit(0), "image": "AA"},
        {"id": "", "vector": unit(0)},
        {"id": "x" * 513, "vector": unit(0)},
        {"id": "url", "image": "http://127.0.0.1/"},
        {"id": "broken", "image": base64.b64encode(b"no picture").decode()},
        {"id": "fat", "vector": unit(0), "metadata": {"a": "x" * 20_000}},
        {"id": "typed", "vector": unit(0), "metadata": []},
        {"id": "more", "vector": unit(0), "colour": 1},
        {"id": "good", "vector": unit(1)},
        b"[1]",
        {"id": 7, "vector": unit(0)},
    )
    answer = service.client.post("/items", content=body, headers=NDJSON).json()
    assert answer["added"] == 1
    reasons = {entry["line"]: (entry["id"], entry["reason"]) for entry in answer["rejected"]}
    assert sorted(reasons) == list(range(2, 16))
    for line, item_id, reason in [
        (2, None, "no JSON"),
        (3, "two", "is 12 numbers, got 2"),
        (4, "none", "exactly one of image and vector"),
        (5, "both", "exactly one of image and vector"),
        (6, "", "at least 1 character"),
        (7, None, "at most 512 characters"),
        (8, "url", "addresses are not fetched"),
        (9, "broken", "no readable"),
        (10, "fat", "max_metadata_bytes"),
        (11, "typed", "metadata"),
        (12, "more", "colour"),
        (13, "good", "twice"),
        (14, None, ""),
        (15, None, "valid string"),
    ]:
        assert reasons[line][0] == item_id, line
        assert reason in reasons[line][1], line
    assert service.client.get("/items/good?include=vector").json()["vector"] == unit(0)


def test_items__a_bad_picture_does_not_cost_the_others(service: Any, picture: Picture) -> None:
    parts = [("images", ("good", picture())), ("images", ("bad", b"x"))]
    answer = service.client.post("/items", files=parts).json()
    assert (answer["added"], len(answer["rejected"])) == (1, 1)
    assert answer["rejected"][0]["id"] == "bad"


def test_items__of_another_model_are_refused_as_a_whole(service: Any) -> None:
    body = ndjson({"id": "a", "vector": unit(0)}, {"id": "b", "vector": unit(0), "model": "other"})
    answer = service.client.post("/items", content=body, headers=NDJSON)
    document = problem(answer, 409, "model_mismatch")
    assert document["model"] == service.bundle.model_id
    problem(service.client.get("/items/a"), 404, "item_not_found")


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"", "application/x-ndjson", 422, "invalid_request"),
        (b"\n\n", "application/x-ndjson", 422, "invalid_request"),
    ],
)
def test_items__refuses_bodies_it_cannot_read(
    shared_service: Any, body: bytes, kind: str, status: int, code: str
) -> None:
    answer = shared_service.client.post("/items", content=body, headers={"Content-Type": kind})
    problem(answer, status, code)


@pytest.mark.parametrize("metadata", ["{", "{}", "[]", "[1,2]"])
def test_items__metadata_must_be_aligned(
    shared_service: Any, picture: Picture, metadata: str
) -> None:
    answer = shared_service.client.post(
        "/items", files={"images": ("a", picture())}, data={"metadata": metadata}
    )
    assert answer.status_code in (400, 422)
    assert "metadata" in answer.json()["detail"]


def test_items__limits_say_their_setting(start_service: Any, tmp_path: Any) -> None:
    limits = {"max_rows": 2, "max_images": 1, "max_line_bytes": 1024, "max_page": 5}
    for service in start_service(tmp_path, **limits):
        post = service.client.post
        lines = [{"id": str(n), "vector": unit(0)} for n in range(3)]
        document = problem(post("/items", content=ndjson(*lines), headers=NDJSON), 413, "too_many")
        assert (document["limit"], document["setting"]) == (2, "max_rows")
        images = ndjson({"id": "a", "image": "AAAA"}, {"id": "b", "image": "AAAA"})
        document = problem(post("/items", content=images, headers=NDJSON), 413, "too_many")
        assert document["setting"] == "max_images"
        long_line = ndjson({"id": "a", "image": "A" * 2000})
        answer = post("/items", content=long_line, headers=NDJSON).json()
        assert "max_line_bytes" in answer["rejected"][0]["reason"]
        document = problem(post("/items/delete", json={"ids": ["a"] * 3}), 413, "too_many")
        assert document["setting"] == "max_rows"
        document = problem(service.client.get("/items?limit=6"), 422, "limit_exceeded")
        assert (document["limit"], document["setting"]) == (5, "max_page")


def test_idempotency_key__repeats_the_answer_and_not_the_effect(
    service: Any, picture: Picture
) -> None:
    post, key = service.client.post, {"Idempotency-Key": "once"}
    parts = [("images", ("a", picture(1))), ("images", ("b", b"bad"))]
    first = post("/items", files=parts, headers=key)
    batches = "invprop_batch_size_count 1.0"
    assert batches in service.client.get("/metrics").text
    again = post("/items", files=parts, headers=key)  # with another multipart boundary
    assert batches in service.client.get("/metrics").text  # nothing was embedded again
    assert again.json() == first.json()
    assert first.json()["added"] == 1
    other = post("/items", files=[("images", ("a", picture(2)))], headers=key)
    problem(other, 409, "idempotency_conflict")
    assert service.client.get("/info").json()["gallery_version"] == 41
    problem(
        post("/items", files=parts, headers={"Idempotency-Key": "x" * 256}), 422, "invalid_request"
    )


def test_delete__takes_slashes_plain_and_encoded(service: Any) -> None:
    delete = service.client.delete
    assert delete("/items/train/0001.png").json()["deleted"] == 1
    assert delete("/items/train%2F0002.png").json()["gallery_version"] == 42
    problem(delete("/items/train/0001.png"), 404, "item_not_found")
    problem(service.client.get("/items/train/0001.png"), 404, "item_not_found")
    problem(delete("/items/"), 404, "item_not_found")


def test_list__answers_the_vectors_too_where_they_are_asked_for(shared_service: Any) -> None:
    get = shared_service.client.get
    page = get("/items?limit=3&cursor=2&include=vector").json()
    plain = get("/items?limit=3&cursor=2").json()
    alone = [get(f"/items/{entry['id']}?include=vector").json() for entry in plain["items"]]
    assert [entry.pop("vector") for entry in page["items"]] == [each["vector"] for each in alone]
    assert page == plain
    problem(get("/items?include=metadata"), 422, "invalid_request")


def test_delete__of_many_names_what_was_not_there(service: Any) -> None:
    ids = ["train/0005.png", "nope", "train/0006.png", "nope"]
    answer = service.client.post("/items/delete", json={"ids": ids}).json()
    assert (answer["deleted"], answer["missing"], answer["gallery_version"]) == (2, ["nope"], 42)
    problem(service.client.post("/items/delete", content=b"x"), 415, "unsupported_media_type")
    problem(service.client.post("/items/delete", json={"id": "a"}), 422, "invalid_request")


def test_delete__by_filter_says_how_many(service: Any) -> None:
    post = service.client.post
    lines = [
        {"id": f"v{n}", "vector": unit(n), "metadata": {"odd": n % 2 == 1, "n": n}}
        for n in range(7)
    ]
    post("/items", content=ndjson(*lines), headers=NDJSON)
    wanted = {"filter": {"odd": True, "n": [1, 2, 5]}}
    answer = post("/items/delete", json=wanted).json()
    assert answer == {
        "model": service.bundle.model_id,
        "gallery_version": 49,
        "deleted": 2,
        "missing": [],
    }
    left = [entry["id"] for entry in service.client.get("/items?cursor=40").json()["items"]]
    assert left == ["v0", "v2", "v3", "v4", "v6"]
    assert post("/items/delete", json=wanted).json()["deleted"] == 0
    assert service.client.get("/info").json()["gallery_version"] == 49


@pytest.mark.parametrize(
    "body",
    [{}, {"ids": ["a"], "filter": {"a": 1}}, {"filter": {}}, {"filter": {"a": {}}}, {"ids": None}],
)
def test_delete__wants_exactly_one_of_ids_and_a_filter(shared_service: Any, body: Any) -> None:
    problem(shared_service.client.post("/items/delete", json=body), 422, "invalid_request")


def test_delete__by_filter_is_bounded_as_by_ids(start_service: Any, tmp_path: Any) -> None:
    for service in start_service(tmp_path, max_rows=2):
        for n in range(3):
            line = {"id": f"v{n}", "vector": unit(n), "metadata": {"x": 1}}
            service.client.post("/items", content=ndjson(line), headers=NDJSON)
        answer = service.client.post("/items/delete", json={"filter": {"x": 1}})
        document = problem(answer, 413, "too_many")
        assert (document["limit"], document["setting"]) == (2, "max_rows")
        assert "got 3" in document["detail"]
        assert service.client.get("/info").json()["gallery"]["items"] == 43


def test_delete__honours_the_idempotency_key(service: Any) -> None:
    post, key = service.client.post, {"Idempotency-Key": "once"}
    line = {"id": "a", "vector": unit(0), "metadata": {"x": 1}}
    for wanted, other in (
        ({"filter": {"x": 1}}, {"filter": {"x": 2}}),
        ({"ids": ["a"]}, {"ids": ["b"]}),
    ):
        key = {"Idempotency-Key": f"once {wanted}"}
        post("/items", content=ndjson(line), headers=NDJSON)
        first = post("/items/delete", json=wanted, headers=key).json()
        assert first["deleted"] == 1
        post("/items", content=ndjson(line), headers=NDJSON)
        assert post("/items/delete", json=wanted, headers=key).json() == first
        assert service.client.get("/items/a").is_success
        problem(post("/items/delete", json=other, headers=key), 409, "idempotency_conflict")
        adding = post("/items", content=ndjson(line), headers={**NDJSON, **key})
        problem(adding, 409, "idempotency_conflict")


def test_metadata__are_kept_exactly_as_sent_or_not_at_all(service: Any) -> None:
    kept = {
        "": -0.0,
        "z": 1e300,
        "a": [True, None, {"ü\u0000": 2**64 - 1, "0": -(2**63)}],
        "f": 0.1,
    }
    lines = (
        {"id": "kept", "vector": unit(0), "metadata": kept},
        {"id": "large", "vector": unit(0), "metadata": {"n": [2**64]}},
        {"id": "digits", "vector": unit(0), "metadata": {"s": "1" * 30}},
        {"id": "nul\0", "vector": unit(0)},
    )
    answer = service.client.post("/items", content=ndjson(*lines), headers=NDJSON).json()
    assert answer["added"] == 2
    assert {r["line"]: r["id"] for r in answer["rejected"]} == {2: "large", 4: "nul\0"}
    assert "18446744073709551616 has more than 64 bits" in answer["rejected"][0]["reason"]
    got = json.loads(service.client.get("/items/kept").text)["metadata"]
    assert json.dumps(got) == json.dumps(kept)  # the order of the names too


def test_list__misses_and_repeats_nothing_that_others_leave_alone(service: Any) -> None:
    body = ndjson(*({"id": f"v{n}", "vector": unit(n % 12)} for n in range(20)))
    service.client.post("/items", content=body, headers=NDJSON)
    seen: list[str] = []
    cursor, turn = "0", 0
    while cursor is not None:
        page = service.client.get(f"/items?limit=7&cursor={cursor}").json()
        seen += [entry["id"] for entry in page["items"]]
        cursor = page["next"]
        if turn < 12:  # before and behind the cursor
            line = ndjson({"id": f"v{turn}", "vector": unit(1)})
            service.client.post("/items", content=line, headers=NDJSON)
            service.client.delete(f"/items/train/{turn * 3:04d}.png")
        turn += 1
    untouched = [f"train/{n:04d}.png" for n in range(40) if n % 3] + [
        f"v{n}" for n in range(12, 20)
    ]
    assert [item_id for item_id in seen if item_id in set(untouched)] == untouched
    assert {f"v{n}" for n in range(12)} <= set(
        seen
    )  # what was written again comes at its new place


def test_ids__may_hold_anything(service: Any) -> None:
    ids = ["delete", "a b", "ends/", "/starts", "q?x=1#y", "..", "日本", "x" * 512]
    body = ndjson(*({"id": item_id, "vector": unit(0)} for item_id in ids))
    assert service.client.post("/items", content=body, headers=NDJSON).json()["added"] == len(ids)
    for item_id in ids:
        if item_id == "..":  # clients resolve it unless it is encoded
            continue
        encoded = "".join(f"%{byte:02X}" for byte in item_id.encode())
        assert service.client.get(f"/items/{encoded}").json()["id"] == item_id
        assert service.client.delete(f"/items/{encoded}").json()["deleted"] == 1


def test_list__walks_by_cursor_and_filters(service: Any) -> None:
    body = ndjson(
        *(
            {"id": f"v{n}", "vector": unit(n), "metadata": {"odd": n % 2 == 1, "n": n}}
            for n in range(7)
        )
    )
    service.client.post("/items", content=body, headers=NDJSON)
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = f"&cursor={cursor}" if cursor else ""
        page = service.client.get(f"/items?limit=9{query}").json()
        seen += [entry["id"] for entry in page["items"]]
        cursor = page["next"]
    assert seen == [f"train/{n:04d}.png" for n in range(40)] + [f"v{n}" for n in range(7)]
    wanted = json.dumps({"odd": True, "n": [1, 2, 5]})
    page = service.client.get("/items", params={"filter": wanted}).json()
    assert page["items"] == [
        {"id": "v1", "metadata": {"odd": True, "n": 1}},
        {"id": "v5", "metadata": {"odd": True, "n": 5}},
    ]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("limit=0", 422, "invalid_request"),
        ("limit=x", 422, "invalid_request"),
        ("cursor=x", 422, "invalid_request"),
        ("cursor=9999999999999999999", 422, "invalid_request"),
        ("filter=x", 400, "bad_request"),
        ("filter=[1]", 422, "invalid_request"),
        ('filter={"a":{"b":1}}', 422, "invalid_request"),
    ],
)
def test_list__refuses_what_it_cannot_read(
    shared_service: Any, query: str, status: int, code: str
) -> None:
    problem(shared_service.client.get(f"/items?{query}"), status, code)


def test_items__whose_metadata_are_nested_too_deep_are_rejected(service: Any) -> None:
    def line(item_id: str, depth: int) -> bytes:
        nested = b'{"a":' * depth + b"1" + b"}" * depth
        return b'{"id":"%b","vector":[%b],"metadata":%b}' % (
            item_id.encode(), b",".join([b"0.5"] * 12), nested,
        )  # fmt: skip

    body = b"\n".join([line("fits", 32), line("deep", 33), line("deeper", 500)])
    answer = service.client.post(
        "/items", content=body, headers={"Content-Type": "application/x-ndjson"}
    ).json()
    assert answer["added"] == 1
    assert [(r["id"], r["reason"]) for r in answer["rejected"]] == [
        (name, "its metadata are nested deeper than 32 levels") for name in ("deep", "deeper")
    ]
    assert service.client.get("/items/fits").status_code == 200
