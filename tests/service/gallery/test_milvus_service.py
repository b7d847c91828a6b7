"""The service on a gallery in Milvus: the answers of its own log, of two services too, and what it
says where Milvus cannot or is away."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import Service
from tests.service.gallery.waiting import until

Start = Callable[..., Iterator[Service]]


@pytest.fixture
def pair(
    start_service: Start, new_collection: Callable[[], str], tmp_path: Path
) -> Iterator[tuple[Service, Service, str]]:
    """Two services on one collection: the first writes, the second looks at it every minute."""
    url = new_collection()
    options: dict[str, Any] = {"gallery": url, "thumbnails": False}
    first = start_service(tmp_path / "a", **options)
    one = next(first)
    second = start_service(tmp_path / "b", follow_interval_s=60.0, **options)
    yield one, next(second), url
    for started in (second, first):
        assert next(started, None) is None


def test_service__answers_from_milvus_as_from_its_log(
    pair: tuple[Service, Service, str],
    start_service: Start,
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> None:
    (one, _, url), plain = pair, start_service(tmp_path / "plain", thumbnails=False)
    other = next(plain)
    files = [("images", (f"{n}.png", picture(n), "image/png")) for n in range(3)]
    metadata = '[{"n": 0}, {"n": 1}, {"n": 1}]'

    def ask(service: Service) -> list[Any]:
        client = service.client
        answers = [
            client.post("/items", files=files, data={"metadata": metadata}),
            client.post("/neighbours", json={"ids": ["0.png", "train/0001.png"], "k": 4}),
            client.post(
                "/neighbours?k=3&include=metadata,vector",
                content=picture(1),
                headers={"Content-Type": "image/png"},
            ),
            client.post("/neighbours", json={"ids": ["0.png"], "filter": {"n": 1}, "k": 9}),
            client.post("/groups", json={"ids": ["1.png"], "k": 3, "steps": 2}),
            client.get("/items?limit=7"),
            client.get('/items?filter={"n":1}'),
            client.get("/items/2.png?include=vector"),
            client.get("/items/nothing"),
            client.get("/images/2.png"),
            client.post("/neighbours", json={"ids": ["0.png", "nothing"]}),
            client.get("/map?sample=20"),
            client.delete("/items/2.png"),
            client.post("/items/delete", json={"filter": {"n": 1}}),
        ]
        return [rounded(answer.json()) for answer in answers]

    assert ask(one) == ask(other)
    info = one.client.get("/info").json()
    assert info["gallery"]["database"].startswith("milvus")
    assert (info["gallery"]["items"], info["gallery"]["graph"]["state"]) == (41, "off")
    grouping = one.client.post("/groupings", json={"k": 3, "steps": 2, "min_size": 2})
    assert grouping.status_code == 202
    until(
        lambda: (
            one.client.get(grouping.headers["Location"]).json()["state"]
            not in ("queued", "running")
        )
    )
    done = one.client.get(grouping.headers["Location"]).json()
    assert (done["state"], sum(done["sizes"]) + done["ungrouped"]) == ("succeeded", 41)
    assert next(plain, None) is None
    assert url


def rounded(value: Any) -> Any:
    """The same answer with numbers that may differ in their last place left at five."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return value


def test_service__reads_what_another_one_has_written_to_milvus(
    pair: tuple[Service, Service, str],
) -> None:
    writer, reader, _ = pair
    line = b'{"id": "new", "vector": [1' + b", 0" * 11 + b"]}"
    kind = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "k"}
    done = writer.client.post("/items", content=line, headers=kind)
    assert done.json()["gallery_version"] == 41
    assert writer.client.post("/items", content=line, headers=kind).json() == done.json()
    header = {"X-Min-Gallery-Version": "41"}
    assert reader.client.get("/items?limit=1").json()["gallery_version"] == 40
    answer = reader.client.post("/neighbours", json={"ids": ["new"]}, headers=header)
    assert (answer.status_code, answer.json()["gallery_version"]) == (200, 41)
    refused = reader.client.post("/items", content=line, headers=kind | {"Idempotency-Key": "l"})
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
    assert refused.headers["Retry-After"] == "5"


def test_service__says_what_milvus_cannot_do_and_when_it_is_away(
    milvus: Any, start_service: Start, new_collection: Callable[[], str], tmp_path: Path
) -> None:
    started = start_service(
        tmp_path / "a", gallery=new_collection(), thumbnails=False, milvus_index="hnsw",
        milvus_whole_items=10,
    )  # fmt: skip
    client = next(started).client
    exact = client.post("/neighbours", json={"ids": ["train/0001.png"], "exact": True})
    assert (exact.status_code, exact.json()["code"]) == (422, "unsupported_by_gallery")
    found = client.post("/neighbours", json={"ids": ["train/0001.png"]})
    assert (found.status_code, found.json()["exact"]) == (200, False)
    for answer in (
        client.post("/groups", json={"ids": ["train/0001.png"]}),
        client.post("/groupings", json={}),
        client.get("/map"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_by_gallery")
    gallery = client.app.state.runtime.gallery  # type: ignore[attr-defined]
    gallery._store._timeout_s = 0.5
    milvus.kill()
    try:
        away = client.get("/items/train/0001.png")
        assert (away.status_code, away.json()["code"]) == (503, "gallery_unreachable")
        until(lambda: client.get("/readyz").status_code == 503)
        assert "Milvus is away" in client.get("/readyz").text
    finally:
        gallery._store._timeout_s = 5.0
        milvus.start()
    until(lambda: client.get("/readyz").status_code == 200)
    assert next(started, None) is None
