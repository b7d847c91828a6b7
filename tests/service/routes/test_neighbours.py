"""POST /neighbours: equal to brute force, whatever the form of the query."""

import base64
import io
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.faiss_index import FaissSnapshot

Picture = Callable[..., bytes]
Units = Callable[..., NDArray[np.float32]]


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


def nearest(service: Any, query: NDArray[np.float32], k: int) -> list[tuple[str, float]]:
    """By numpy in float64."""
    gallery = service.bundle.gallery()
    cosines = gallery.embeddings.astype(np.float64) @ query.astype(np.float64)
    return [(gallery.ids[n], float(cosines[n])) for n in np.argsort(-cosines)[:k]]


def check(results: list[Any], expected: list[tuple[str, float]]) -> None:
    assert [hit["id"] for hit in results] == [item_id for item_id, _ in expected]
    np.testing.assert_allclose(
        [hit["similarity"] for hit in results], [s for _, s in expected], atol=1e-6
    )


def test_neighbours__of_vectors_equal_brute_force(shared_service: Any, random_units: Units) -> None:
    queries = random_units(20, 12, 1)
    document = shared_service.client.post(
        "/neighbours", json={"vectors": queries.tolist(), "k": 7}
    ).json()
    assert list(document) == ["model", "gallery_version", "exact", "results"]
    assert document["exact"] is True
    for query, results in zip(queries, document["results"], strict=True):
        check(results, nearest(shared_service, query, 7))


def test_neighbours__of_an_image_in_every_form(shared_service: Any, picture: Picture) -> None:
    image = picture(1)
    text = base64.b64encode(image).decode()
    expected = nearest(shared_service, shared_service.embedding(image), 3)
    post = shared_service.client.post
    for answer in (
        post("/neighbours", json={"images": [text], "k": 3}),
        post("/neighbours?k=3", content=image, headers={"Content-Type": "image/png"}),
        post("/neighbours?k=3", files={"images": ("x.png", image)}),
    ):
        assert len(answer.json()["results"]) == 1
        check(answer.json()["results"][0], expected)


def test_neighbours__by_id_leave_that_item_out(shared_service: Any) -> None:
    gallery = shared_service.bundle.gallery()
    document = shared_service.client.post(
        "/neighbours", json={"ids": [gallery.ids[3], gallery.ids[0]], "k": 5}
    ).json()
    for row, results in zip((3, 0), document["results"], strict=True):
        check(results, nearest(shared_service, gallery.embeddings[row], 6)[1:])
    graph = gallery.graph.neighbours[3][:4]
    assert [hit["id"] for hit in document["results"][0][:4]] == [gallery.ids[n] for n in graph]


def test_neighbours__in_numpys_formats(shared_service: Any, random_units: Units) -> None:
    queries = random_units(3, 12, 2)
    body = io.BytesIO()
    np.save(body, queries)
    answer = shared_service.client.post(
        "/neighbours?k=4",
        content=body.getvalue(),
        headers={"Content-Type": "application/x-npy", "Accept": "application/x-npz"},
    )
    assert answer.headers["content-type"] == "application/x-npz"
    assert answer.headers["x-model-id"] == shared_service.bundle.model_id
    arrays = np.load(io.BytesIO(answer.content))
    assert arrays["similarities"].dtype == np.float32
    for query, ids, similarities in zip(
        queries, arrays["ids"], arrays["similarities"], strict=True
    ):
        expected = nearest(shared_service, query, 4)
        assert ids.tolist() == [item_id for item_id, _ in expected]
        np.testing.assert_allclose(similarities, [s for _, s in expected], atol=1e-6)


def test_neighbours__give_fewer_where_there_are_fewer(shared_service: Any) -> None:
    body = {"ids": ["train/0000.png"], "k": 1000}
    document = shared_service.client.post("/neighbours", json=body).json()
    assert len(document["results"][0]) == 39


def test_neighbours__filter_first_and_include(service: Any, random_units: Units) -> None:
    vectors = random_units(60, 12, 3)
    lines = [
        {"id": f"v{n}", "vector": v.tolist(), "metadata": {"set": "ab"[n % 2], "n": n}}
        for n, v in enumerate(vectors)
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    headers = {"Content-Type": "application/x-ndjson"}
    assert service.client.post("/items", content=body, headers=headers).json()["added"] == 60
    query = random_units(1, 12, 4)
    cosines = vectors.astype(np.float64) @ query[0]
    expected = [n for n in np.argsort(-cosines) if n % 2 == 0][:25]
    request = {
        "vectors": query.tolist(),
        "k": 25,
        "filter": {"set": "a"},
        "include": ["metadata", "vector"],
    }
    (results,) = service.client.post("/neighbours", json=request).json()["results"]
    assert [hit["id"] for hit in results] == [f"v{n}" for n in expected]
    assert results[0]["metadata"] == {"set": "a", "n": int(expected[0])}
    np.testing.assert_array_equal(np.float32(results[0]["vector"]), vectors[expected[0]])
    npy = io.BytesIO()
    np.save(npy, query)
    answer = service.client.post(
        "/neighbours",
        params={"k": 2, "filter": '{"set":["a"]}', "include": "metadata"},
        content=npy.getvalue(),
        headers={"Content-Type": "application/x-npy"},
    ).json()
    assert [hit["id"] for hit in answer["results"][0]] == [f"v{n}" for n in expected[:2]]
    assert set(answer["results"][0][0]) == {"id", "similarity", "metadata"}
    nothing = {"vectors": query.tolist(), "filter": {"set": "c"}}
    assert service.client.post("/neighbours", json=nothing).json()["results"] == [[]]


@pytest.mark.parametrize(("products", "inline"), [(12 * 40, True), (12 * 40 - 1, False)])
def test_neighbours__short_searches_need_no_thread(
    shared_service: Any,
    random_units: Units,
    monkeypatch: pytest.MonkeyPatch,
    products: int,
    inline: bool,
) -> None:
    assert len(shared_service.bundle.gallery().ids) == 40
    monkeypatch.setattr("service.routes.neighbours.INLINE_PRODUCTS", products)
    threads = []
    search = FaissSnapshot.search

    def seen(self: FaissSnapshot, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return search(self, *arguments, **options)

    monkeypatch.setattr(FaissSnapshot, "search", seen)
    (query,) = random_units(1, 12, 1)
    answer = shared_service.client.post("/neighbours", json={"vectors": [query.tolist()], "k": 7})
    check(answer.json()["results"][0], nearest(shared_service, query, 7))
    (thread,) = threads
    assert thread.startswith("compute") is not inline


def test_neighbours__of_arrays_past_the_router_answers_as_behind_it(
    shared_service: Any, random_units: Units
) -> None:
    npy = io.BytesIO()
    np.save(npy, random_units(2, 12, 1))

    def post(query: str, content: bytes, kind: str) -> Any:
        return shared_service.client.post(
            f"/neighbours?{query}", content=content, headers={"Content-Type": kind}
        )

    def counted() -> float:
        series = "invprop_request_duration_seconds_count"
        text = shared_service.client.get("/metrics").text
        found = re.search(series + r'{method="POST",route="/neighbours"} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = counted()
    for query, content in (
        ("k=3", npy.getvalue()),
        ("k=0", npy.getvalue()),
        ("k=3&steps=2", npy.getvalue()),
        ("k=3", b"no npy"),
        ("k=3&include=metadata&" + "filter=" + "%20" * 300 + '{"a":1}', npy.getvalue()),
    ):
        # A parameter sends the same type by way of the router.
        direct = post(query, content, "application/x-npy")
        routed = post(query, content, "application/x-npy; charset=binary")
        assert (direct.status_code, direct.json()) == (routed.status_code, routed.json())
        assert direct.headers["content-type"] == routed.headers["content-type"]
    assert counted() - before == 10


UNIT = [1.0] + [0.0] * 11


@pytest.mark.parametrize(
    ("body", "status", "code", "detail"),
    [
        ({}, 422, "invalid_request", "got none of them"),
        ({"ids": ["a"], "vectors": [UNIT]}, 422, "invalid_request", "got vectors and ids"),
        ({"ids": []}, 422, "invalid_request", "ids"),
        ({"ids": ["nope"]}, 404, "item_not_found", "'nope'"),
        ({"ids": [3]}, 422, "invalid_request", "ids.0"),
        ({"vectors": []}, 422, "invalid_request", "at least one"),
        ({"vectors": UNIT}, 422, "invalid_request", "vectors.0"),
        ({"vectors": [UNIT, UNIT[:5]]}, 422, "invalid_request", "vectors.1"),
        ({"vectors": [[0] * 12]}, 422, "invalid_request", "length 0"),
        ({"vectors": [["1"] * 12]}, 422, "invalid_request", "no list of numbers"),
        ({"images": ["x y"]}, 422, "image_rejected", "base64"),
        ({"vectors": [UNIT], "k": 0}, 422, "invalid_request", "k: "),
        ({"vectors": [UNIT], "k": 1001}, 422, "invalid_request", "1000"),
        ({"vectors": [UNIT], "k": 2.5}, 422, "invalid_request", "k: "),
        ({"vectors": [UNIT], "k": True}, 422, "invalid_request", "k: "),
        ({"vectors": [UNIT], "filter": {"a": {}}}, 422, "invalid_request", "filter"),
        ({"vectors": [UNIT], "filter": []}, 422, "invalid_request", "filter"),
        ({"vectors": [UNIT], "include": ["secret"]}, 422, "invalid_request", "include"),
        ({"vectors": [UNIT], "foo": 1}, 422, "invalid_request", "foo"),
    ],
)
def test_neighbours__say_what_is_wrong(
    shared_service: Any, body: Any, status: int, code: str, detail: str
) -> None:
    document = problem(shared_service.client.post("/neighbours", json=body), status, code)
    assert detail in document["detail"]


def test_neighbours__limits_say_their_setting(start_service: Any, tmp_path: Any) -> None:
    for service in start_service(tmp_path, max_rows=3, max_results=20, max_images=2):
        post = service.client.post
        for body in ({"vectors": [UNIT] * 4}, {"ids": ["a"] * 4}):
            document = problem(post("/neighbours", json=body), 413, "too_many")
            assert (document["limit"], document["setting"]) == (3, "max_rows")
        document = problem(post("/neighbours", json={"images": ["AA"] * 3}), 413, "too_many")
        assert document["setting"] == "max_images"
        body = {"vectors": [UNIT] * 3, "k": 7}
        document = problem(post("/neighbours", json=body), 422, "limit_exceeded")
        assert (document["limit"], document["setting"]) == (20, "max_results")


@pytest.mark.parametrize("query", ["k=x", "k=0", "filter={", "kk=1", "include=secret"])
def test_neighbours__check_query_parameters_too(
    shared_service: Any, picture: Picture, query: str
) -> None:
    answer = shared_service.client.post(
        f"/neighbours?{query}", content=picture(), headers={"Content-Type": "image/png"}
    )
    problem(answer, 422, "invalid_request")
