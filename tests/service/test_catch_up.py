"""Read your writes: with X-Min-Gallery-Version a request waits for that version, or says no."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
from fastapi import Request
from numpy.typing import NDArray

from service.catch_up import HEADER, CatchUp, min_version_of
from service.errors import Problem
from tests.service.conftest import Service

Start = Callable[..., Iterator[Service]]


class Followed:
    """A gallery whose snapshots come when the test says so."""

    model_id = "m" * 64

    def __init__(self) -> None:
        self.version = 5
        self.refreshed = 0

    def snapshot(self) -> Any:
        return self

    def refresh(self) -> None:
        self.refreshed += 1


def request_with(*values: str) -> Request:
    raw = [(HEADER.lower().encode(), value.encode("latin-1")) for value in values]
    return Request({"type": "http", "headers": [(b"accept", b"*/*"), *raw]})


@pytest.mark.parametrize(
    ("values", "version"), [((), None), (("0",), 0), ((" 42 ",), 42), (("9" * 18,), 10**18 - 1)]
)
def test_min_version__is_read(values: tuple[str, ...], version: int | None) -> None:
    assert min_version_of(request_with(*values)) == version


@pytest.mark.parametrize("values", [("",), ("-1",), ("1.5",), ("9" * 19,), ("1", "2"), ("²",)])
def test_min_version__that_is_none_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(Problem, match="wanted one number of 1 to 18 digits") as refused:
        min_version_of(request_with(*values))
    assert refused.value.code == "invalid_request"


def test_wait__for_what_is_there_asks_nobody() -> None:
    gallery: Any = Followed()
    asyncio.run(CatchUp(0.0).wait(gallery, 5))
    assert gallery.refreshed == 0


def test_wait__ends_with_the_version_and_not_before() -> None:
    gallery: Any = Followed()

    async def scenario() -> None:
        catch_up = CatchUp(60.0)
        waiting = [asyncio.create_task(catch_up.wait(gallery, n)) for n in (6, 7)]
        await asyncio.sleep(0)
        assert gallery.refreshed == 2
        gallery.version = 6
        writer = threading.Thread(target=catch_up.note, args=(gallery,))
        writer.start()
        await waiting[0]
        writer.join()
        assert not waiting[1].done()
        gallery.version = 8
        catch_up.note(gallery)
        await waiting[1]
        catch_up.note(gallery)  # nobody waits any more

    asyncio.run(scenario())


def test_wait__that_is_in_vain_says_what_is_held() -> None:
    gallery: Any = Followed()
    with pytest.raises(Problem) as behind:
        asyncio.run(CatchUp(0.0).wait(gallery, 6))
    assert (behind.value.code, behind.value.retry_after_s) == ("gallery_behind", 1)
    assert behind.value.extensions == {"held": 5, "limit": 0.0, "setting": "max_catch_up_s"}
    assert "version 5 of model mmmmmmmmmmmm" in behind.value.detail


@pytest.fixture
def pair(
    start_service: Start, new_database: Callable[[], str], tmp_path: Path
) -> Iterator[tuple[Service, Service]]:
    """Two services on one database; the second looks at it by itself every minute only."""
    url = new_database()
    options = {"database": url, "follow_interval_s": 60.0, "graph_neighbours": 0}
    first = start_service(tmp_path / "a", **options)
    second = start_service(tmp_path / "b", **options)
    yield next(first), next(second)
    for started in (second, first):
        assert next(started, None) is None


def add(service: Service, item_id: str, vector: NDArray[np.float32]) -> int:
    line = orjson.dumps({"id": item_id, "vector": vector.tolist()})
    kind = {"Content-Type": "application/x-ndjson"}
    answer = service.client.post("/items", content=line, headers=kind)
    assert answer.status_code == 200
    version: int = answer.json()["gallery_version"]
    return version


def read(service: Service, what: str, vector: NDArray[np.float32], **headers: str) -> Any:
    """Ask for item `new` by one of the routes that read the gallery."""
    npy = {"Content-Type": "application/x-npy", **headers}
    body = io.BytesIO()
    np.save(body, vector[None])
    ids = {"ids": ["new"]}
    client = service.client
    ask: dict[str, Callable[[], httpx2.Response]] = {
        "neighbours by id": lambda: client.post("/neighbours", json=ids, headers=headers),
        "neighbours": lambda: client.post("/neighbours?k=1", content=body.getvalue(), headers=npy),
        "groups": lambda: client.post("/groups", json=ids, headers=headers),
        "item": lambda: client.get("/items/new", headers=headers),
        "items": lambda: client.get("/items?limit=100", headers=headers),
        "image": lambda: client.get("/images/new", headers=headers),
        "map": lambda: client.get("/map", headers=headers),
        "grouping": lambda: client.post("/groupings", json={}, headers=headers),
    }
    return ask[what]()


READS = ("neighbours by id", "neighbours", "groups", "item", "items", "image", "map", "grouping")


def test_a_service__answers_with_what_another_one_has_written(
    pair: tuple[Service, Service], random_units: Callable[..., NDArray[np.float32]]
) -> None:
    writer, reader = pair
    vectors = random_units(len(READS), 12, 3)
    for what, vector in zip(READS, vectors, strict=True):
        version = add(writer, "new", vector)
        stale = read(reader, what, vector)  # the header does it, not the passing of time
        assert stale.headers.get("X-Gallery-Version", "") != str(version)
        assert stale.status_code >= 400 or stale.json()["gallery_version"] < version
        fresh = read(reader, what, vector, **{HEADER: str(version)})
        if what == "image":
            assert fresh.json()["code"] == "picture_not_found"  # the item is there
            continue
        assert fresh.status_code in (200, 202), (what, fresh.text)
        assert fresh.json()["gallery_version"] == version, what
        if what == "neighbours":
            assert fresh.json()["results"][0][0]["id"] == "new"


@pytest.mark.parametrize("what", READS)
def test_a_version__that_is_not_there_is_refused_with_when_to_ask_again(
    shared_service: Service, what: str, random_units: Callable[..., NDArray[np.float32]]
) -> None:
    (vector,) = random_units(1, 12, 3)
    runtime = shared_service.client.app.state.runtime  # type: ignore[attr-defined]
    patience, runtime._catch_up._max_wait_s = runtime._catch_up._max_wait_s, 0.0
    try:
        answer = read(shared_service, what, vector, **{HEADER: "1000000"})
    finally:
        runtime._catch_up._max_wait_s = patience
    assert (answer.status_code, answer.json()["code"]) == (503, "gallery_behind")
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["held"] == 40
    assert read(shared_service, what, vector, **{HEADER: "x"}).status_code == 422


def test_a_database__that_is_away_leaves_the_reader_behind(
    pair: tuple[Service, Service],
    postgresql: Any,
    random_units: Callable[..., NDArray[np.float32]],
) -> None:
    writer, reader = pair
    (vector,) = random_units(1, 12, 3)
    version = add(writer, "new", vector)
    postgresql.stop()
    try:
        answer = read(reader, "item", vector, **{HEADER: str(version)})
        assert (answer.status_code, answer.json()["code"]) == (503, "gallery_behind")
        assert read(reader, "items", vector).status_code == 200
    finally:
        postgresql.start()
    assert read(reader, "item", vector, **{HEADER: str(version)}).status_code == 200
