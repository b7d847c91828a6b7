"""GET /map: PCA at once, UMAP later, and what is wrong with a question."""

import io
import threading
import time
from typing import Any

import numpy as np
import pytest

from service.map import Maps, pca


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document


def test_map__by_pca_is_answered_at_once(shared_service: Any) -> None:
    gallery = shared_service.bundle.gallery()
    document = shared_service.client.get("/map").json()
    assert (document["method"], document["items"]) == ("pca", 40)
    assert document["gallery_version"] == 40
    assert document["ids"] == gallery.ids
    np.testing.assert_array_equal(
        np.asarray(document["coordinates"], np.float32), pca(gallery.embeddings)
    )
    some = shared_service.client.get("/map?sample=7").json()
    assert some == shared_service.client.get("/map?sample=7&version=40").json()
    assert len(some["ids"]) == 7
    packed = shared_service.client.get("/map?sample=7", headers={"Accept": "application/x-npz"})
    arrays = np.load(io.BytesIO(packed.content))
    assert arrays["ids"].tolist() == some["ids"]
    np.testing.assert_array_equal(arrays["coordinates"], np.float32(some["coordinates"]))
    assert packed.headers["X-Gallery-Version"] == "40"


def test_map__by_umap_is_of_the_version_that_was_asked_for(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.client
    maps = client.app.state.runtime.maps
    monkeypatch.setattr(maps, "_umap", lambda vectors: np.asarray(vectors[:, :2]))
    pending = client.get("/map?method=umap&sample=8")
    assert pending.status_code == 202
    assert pending.headers["Retry-After"] == "1"
    assert pending.json()["state"] == "computing"
    client.delete("/items/train/0000.png")
    place, until = pending.headers["Location"], time.monotonic() + 20
    while (answer := client.get(place)).status_code == 202 and time.monotonic() < until:
        pass
    assert answer.status_code == 200, answer.text
    assert answer.json()["gallery_version"] == 40
    assert len(answer.json()["ids"]) == 8
    now = client.get("/map?method=umap&sample=8")
    assert "version=41" in now.headers["Location"]
    problem(client.get("/map?method=umap&sample=9&version=40"), 404, "map_not_found")


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("method=tsne", "pca"),
        ("sample=0", "sample"),
        ("sample=x", "sample"),
        ("version=-1", "version"),
    ],
)
def test_map__says_what_is_wrong(shared_service: Any, query: str, detail: str) -> None:
    answer = shared_service.client.get(f"/map?{query}")
    assert detail in problem(answer, 422, "invalid_request")["detail"]


def test_map__limits_and_failures_name_their_settings(
    start_service: Any, tmp_path: Any, make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.representation.bundle import open_bundle

    few = open_bundle(make_bundle(tmp_path / "few", images=5))
    refused_one, really = threading.Event(), Maps._umap

    def held(maps: Maps, vectors: Any) -> Any:
        assert refused_one.wait(20)
        return really(maps, vectors)

    monkeypatch.setattr(Maps, "_umap", held)
    for service in start_service(
        tmp_path / "state", of=few, max_map_sample=5, maps_pending=1, map_timeout_s=0.1
    ):
        client = service.client
        document = problem(client.get("/map?sample=6"), 422, "limit_exceeded")
        assert (document["limit"], document["setting"]) == (5, "max_map_sample")
        assert len(client.get("/map").json()["ids"]) == 5  # the default follows the limit
        pending = client.get("/map?method=umap")
        assert pending.status_code == 202
        refused = client.get("/map?method=umap&sample=4")
        assert problem(refused, 429, "queue_full")["setting"] == "maps_pending"
        refused_one.set()
        until = time.monotonic() + 20
        place = pending.headers["Location"]
        while (answer := client.get(place)).status_code == 202 and time.monotonic() < until:
            pass
        document = problem(answer, 503, "map_failed")
        assert (document["limit"], document["setting"]) == (0.1, "map_timeout_s")
        client.delete("/items/train/0000.png")
        answer = client.get("/map?method=umap")
        assert "at least 5" in problem(answer, 422, "invalid_request")["detail"]
        assert client.get("/map").status_code == 200
