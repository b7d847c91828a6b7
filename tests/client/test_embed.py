"""embed(): rows in the order of the pictures, in as many requests as the limits ask for."""

import io
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from client import Embeddings, ImageRejected, Rejected, UnexpectedAnswer
from tests.client.fake_answers import embed_digits, images_in, npy, skip_x


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
