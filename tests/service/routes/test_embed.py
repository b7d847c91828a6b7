"""POST /embed: every kind of body, every refusal."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainer.representation.preprocess import prepare

Picture = Callable[..., bytes]
PNG = {"Content-Type": "image/png"}


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Check that the answer is this problem, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert (document["code"], document["status"]) == (code, status)
    assert set(document) >= {"type", "title", "detail"}
    assert "Traceback" not in answer.text
    return document


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_embed__takes_one_raw_image(shared_service: Any, picture: Picture, format: str) -> None:
    image = picture(1, format=format)
    headers = {"Content-Type": f"image/{format.lower()}"}
    answer = shared_service.client.post("/embed", content=image, headers=headers)
    assert answer.status_code == 200
    document = answer.json()
    assert list(document) == ["model", "output", "dim", "embeddings"]
    assert (document["model"], document["dim"]) == (shared_service.bundle.model_id, 12)
    np.testing.assert_allclose(document["embeddings"], [shared_service.embedding(image)], atol=1e-6)


def test_embed__keeps_the_order_of_multipart_and_json(
    shared_service: Any, picture: Picture
) -> None:
    images = [picture(seed) for seed in range(6)]
    expected = [shared_service.embedding(image) for image in images]
    parts = [("images", (f"{n}.png", image)) for n, image in enumerate(images)]
    texts = [base64.b64encode(image).decode() for image in images]
    texts[1] = f"data:image/png;base64,{texts[1]}"
    for answer in (
        shared_service.client.post("/embed", files=parts),
        shared_service.client.post("/embed", json={"images": texts}),
    ):
        np.testing.assert_allclose(answer.json()["embeddings"], expected, atol=1e-6)


def test_embed__takes_prepared_pixels_and_gives_npy(shared_service: Any, picture: Picture) -> None:
    images = [picture(seed) for seed in range(3)]
    pixels = np.stack([prepare(image, shared_service.bundle.contract) for image in images])
    answer = shared_service.client.post(
        "/embed",
        content=npy(pixels),
        headers={"Content-Type": "application/x-npy", "Accept": "application/x-npy"},
    )
    assert answer.headers["content-type"] == "application/x-npy"
    assert answer.headers["x-model-id"] == shared_service.bundle.model_id
    rows = np.load(io.BytesIO(answer.content))
    assert rows.dtype == np.float32
    expected = [shared_service.embedding(image) for image in images]
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_embed__past_the_router_and_through_it_are_one(
    shared_service: Any, picture: Picture
) -> None:
    pixels = prepare(picture(4), shared_service.bundle.contract)[None]
    bodies = (npy(pixels), npy(pixels[:, :-1]), b"no array", npy(pixels)[:-1])
    statuses = []
    for accept in ("application/x-npy", "application/json"):
        headers = {"Content-Type": "application/x-npy", "Accept": accept, "X-Request-Id": "same"}
        for body in bodies:
            direct, routed = (
                shared_service.client.post(f"/embed{query}", content=body, headers=headers)
                for query in ("", "?output=embedding")
            )
            assert direct.content == routed.content
            assert sorted(direct.headers.items()) == sorted(routed.headers.items())
            assert direct.status_code == routed.status_code
            statuses.append(direct.status_code)
    assert statuses == [200, 422, 422, 422] * 2
    text = shared_service.client.get("/metrics").text
    assert 'invprop_requests_total{method="POST",route="/embed",status="200"}' in text
    assert 'route="unmatched",status="422"' not in text


def test_embed__gives_features_when_asked(shared_service: Any, picture: Picture) -> None:
    answer = shared_service.client.post("/embed?output=features", content=picture(), headers=PNG)
    document = answer.json()
    assert (document["output"], document["dim"]) == ("features", 16)
    assert len(document["embeddings"][0]) == 16


def test_embed__rejects_the_request_for_a_bad_picture(
    shared_service: Any, picture: Picture
) -> None:
    parts = [("images", ("a", picture())), ("images", ("b", b"no")), ("images", ("c", b""))]
    document = problem(shared_service.client.post("/embed", files=parts), 422, "image_rejected")
    assert [entry["index"] for entry in document["errors"]] == [1, 2]
    assert "no readable" in document["errors"][0]["reason"]
    assert "empty" in document["errors"][1]["reason"]


def test_embed__skips_bad_pictures_when_asked(shared_service: Any, picture: Picture) -> None:
    good, texts = picture(), ["http://x/y.png", base64.b64encode(picture()).decode(), "AAAA"]
    url = "/embed?on_error=skip"
    document = shared_service.client.post(url, json={"images": texts}).json()
    assert [row is None for row in document["embeddings"]] == [True, False, True]
    assert [entry["index"] for entry in document["errors"]] == [0, 2]
    np.testing.assert_allclose(document["embeddings"][1], shared_service.embedding(good), atol=1e-6)
    answer = shared_service.client.post(
        url, json={"images": texts}, headers={"Accept": "application/x-npy"}
    )
    assert answer.headers["x-rejected"] == "0,2"
    rows = np.load(io.BytesIO(answer.content))
    assert np.isnan(rows).all(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"x", "image/gif", 415, "unsupported_media_type"),
        (b"x", "", 415, "unsupported_media_type"),
        (b"x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"", "image/png", 422, "image_rejected"),
        (b"{", "application/json", 400, "bad_request"),
        (b"[" * 100_000, "application/json", 400, "bad_request"),
        (b"[]", "application/json", 422, "invalid_request"),
        (b'{"images": []}', "application/json", 422, "invalid_request"),
        (b'{"images": [1]}', "application/json", 422, "invalid_request"),
        (b'{"images": ["AA"], "more": 1}', "application/json", 422, "invalid_request"),
        (b"\xff\xfe", "application/json", 400, "bad_request"),
        (b"x", "application/x-npy", 422, "invalid_request"),
        (npy(np.zeros((1, 8, 9, 3), np.uint8)), "application/x-npy", 422, "invalid_request"),
        (npy(np.zeros((1, 8, 8, 3))), "application/x-npy", 422, "invalid_request"),
        (b"x", "multipart/form-data", 400, "bad_request"),
        (b"x", "multipart/form-data; boundary=b", 400, "bad_request"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 422, "invalid_request"),
    ],
)
def test_embed__refuses_bodies_it_cannot_read(
    shared_service: Any, body: bytes, kind: str, status: int, code: str
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    problem(shared_service.client.post("/embed", content=body, headers=headers), status, code)


def test_embed__refuses_unknown_parts_and_options(shared_service: Any, picture: Picture) -> None:
    post = shared_service.client.post
    document = problem(post("/embed", files={"image": ("a", picture())}), 422, "invalid_request")
    assert "'image' is not known" in document["detail"]
    document = problem(
        post("/embed", data={"images": "text"}, files={"images": ("a", picture())}),
        422,
        "invalid_request",
    )
    assert "without a file name" in document["detail"]
    problem(post("/embed?output=pixels", content=b"", headers=PNG), 422, "invalid_request")
    problem(post("/embed?on_error=hide", content=b"", headers=PNG), 422, "invalid_request")
    problem(shared_service.client.get("/embed"), 405, "method_not_allowed")


def test_embed__limits_say_their_setting(
    start_service: Any, tmp_path: Any, picture: Picture
) -> None:
    for service in start_service(tmp_path, max_images=2, max_body_bytes=20_000):
        post, image = service.client.post, picture()
        three = [("images", (str(n), image)) for n in range(3)]
        many = npy(np.zeros((3, 8, 8, 3), np.uint8))
        text = base64.b64encode(image).decode()
        for answer in (
            post("/embed", files=three),
            post("/embed", files=three * 4),
            post("/embed", json={"images": [text] * 3}),
            post("/embed", content=many, headers={"Content-Type": "application/x-npy"}),
        ):
            document = problem(answer, 413, "too_many")
            assert (document["limit"], document["setting"]) == (2, "max_images")
        for content in (b"x" * 20_001, (b"x" * 5000 for _ in range(1000))):
            # The second has no Content-Length: it is refused while it streams.
            document = problem(post("/embed", content=content, headers=PNG), 413, "body_too_large")
            assert (document["limit"], document["setting"]) == (20_000, "max_body_bytes")
