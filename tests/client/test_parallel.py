"""Parts that are sent together: decided by client.parallel, run by both clients."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from client import AsyncClient, Client, InternalError, QueueFull
from client.parallel import Parallel, Stopped
from client.retry import Together
from tests.client.fake_answers import ADDED, embed_digits, images_in, lines_in


def parts_of(count: int, at_once: int) -> Parallel:
    def nothing() -> Iterator[Any]:
        return iter(())

    made: Iterator[Callable[[], Any]] = (nothing for _ in range(count))
    return Parallel(Together(made, at_once))  # type: ignore[arg-type]


def drawn(parts: Parallel) -> list[Any]:
    found = []
    while (part := parts.draw()) is not None:
        found.append(part)
    return found


def busy() -> QueueFull:
    return QueueFull("full", status=429)


def test_parallel__no_more_than_there_is_room_for() -> None:
    parts = parts_of(5, 2)
    first, second = drawn(parts)
    assert (first.number, second.number, parts.flying) == (0, 1, 2)
    parts.ended(second, None)
    (third,) = drawn(parts)
    assert third.number == 2


@pytest.mark.parametrize(("at_once", "ahead"), [(1, 0), (2, 1), (4, 1)])
def test_parallel__one_part_more_is_made_ready_where_several_are_on_their_way(
    at_once: int, ahead: int
) -> None:
    made: list[int] = []

    def make() -> Iterator[Any]:
        for number in range(9):
            made.append(number)
            yield lambda: iter(())

    parts = Parallel(Together(make(), at_once))
    flying = drawn(parts)
    assert made == list(range(at_once + ahead))
    parts.ended(flying[0], None)
    assert [part.number for part in drawn(parts)] == [at_once]
    assert made == list(range(at_once + 1 + ahead))


def test_parallel__what_cannot_be_made_ready_fails_the_call() -> None:
    def make() -> Iterator[Any]:
        yield lambda: iter(())
        yield lambda: iter(())
        raise OSError("no such file")

    parts = Parallel(Together(make(), 2))
    flying = drawn(parts)
    for part in flying:
        parts.ended(part, Stopped())
    assert drawn(parts) == []
    assert isinstance(parts.failure, OSError)


def test_parallel__a_busy_service_gets_fewer_at_a_time_and_the_part_again() -> None:
    parts = parts_of(6, 4)
    flying = drawn(parts)
    parts.ended(flying[1], busy())  # room 2, three on their way
    assert drawn(parts) == []
    parts.ended(flying[0], None)
    parts.ended(flying[2], None)
    (again,) = drawn(parts)
    assert (again.number, parts.flying) == (1, 2)
    parts.ended(again, busy())  # room 1
    parts.ended(flying[3], busy())
    (again,) = drawn(parts)
    assert again.number == 1
    parts.ended(again, busy())  # alone, and refused all the same: that is the answer
    assert isinstance(parts.failure, QueueFull)


def test_parallel__a_whole_wave_that_is_refused_goes_on_one_by_one() -> None:
    parts = parts_of(4, 4)
    for part in drawn(parts):
        parts.ended(part, busy())
    for number in range(4):
        (part,) = drawn(parts)
        assert part.number == number
        parts.ended(part, None)
    assert (parts.failure, parts.flying) == (None, 0)


def test_parallel__the_first_failure_in_order_counts_and_nothing_more_is_drawn() -> None:
    parts = parts_of(9, 3)
    flying = drawn(parts)
    parts.ended(flying[2], ValueError("third"))
    parts.ended(flying[0], Stopped())
    parts.ended(flying[1], KeyError("second"))
    assert drawn(parts) == []
    assert isinstance(parts.failure, KeyError)


class Meeting:
    """Answers when `count` requests are there at the same time."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=10)
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self._barrier.wait()
        with self._lock:
            self._now -= 1
        return embed_digits(request)


def test_embed__parts_are_on_their_way_together_and_come_back_in_order(fake: Any) -> None:
    meeting = Meeting(3)
    fake.limits["max_images"] = 1
    fake.on("POST", "/embed", meeting)
    with Client("http://fake", transport=httpx2.MockTransport(fake), concurrency=3) as service:
        found = service.embed([str(n).encode() for n in range(9)])
    np.testing.assert_array_equal(found.embeddings[:, 0], range(9))
    assert meeting.most == 3


def test_embed__async_parts_are_on_their_way_together(fake: Any) -> None:
    most = now = 0

    async def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal most, now
        if request.url.path == "/info":
            return fake(request)
        now += 1
        most = max(most, now)
        for _ in range(100):
            if most == 3:
                break
            await asyncio.sleep(0.001)
        now -= 1
        return embed_digits(request)

    async def ask() -> Any:
        transport = httpx2.MockTransport(handler)
        async with AsyncClient("http://fake", transport=transport, concurrency=3) as service:
            return await service.embed([str(n).encode() for n in range(9)])

    fake.limits["max_images"] = 1
    np.testing.assert_array_equal(asyncio.run(ask()).embeddings[:, 0], range(9))
    assert most == 3


def test_embed__a_part_is_no_larger_than_it_has_to_be(fake: Any, connect: Any) -> None:
    fake.on("POST", "/embed", embed_digits)
    connect(concurrency=2).embed([b"1"] * 70)
    assert sorted(len(images_in(request)) for request in fake.asked("/embed")) == [6, 32, 32]


def test_embed__pictures_are_read_as_they_are_sent(fake: Any, connect: Any) -> None:
    fake.limits["max_images"] = 1
    ahead: list[int] = []
    read = 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        ahead.append(read - len(fake.asked("/embed")))
        return embed_digits(request)

    def pictures() -> Iterator[bytes]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield b"1"

    fake.on("POST", "/embed", handler)
    connect(concurrency=2).embed(pictures())
    # One part is closed only when its successor's first picture is there.
    assert max(ahead) <= 4


def test_embed__a_busy_service_is_asked_less_and_gets_everything(fake: Any, connect: Any) -> None:
    refusals = iter([True] * 4)

    def handler(request: httpx2.Request) -> httpx2.Response:
        if next(refusals, False):
            return httpx2.Response(429, json={"code": "queue_full", "detail": "full"})
        return embed_digits(request)

    fake.limits["max_images"] = 1
    fake.on("POST", "/embed", handler)
    found = connect(concurrency=4, max_retries=0).embed([str(n).encode() for n in range(8)])
    np.testing.assert_array_equal(found.embeddings[:, 0], range(8))


def test_embed__a_failure_of_one_part_is_raised_and_ends_the_call(fake: Any, connect: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if b"7" in images_in(request):
            return httpx2.Response(500, json={"code": "internal_error", "detail": "no"})
        return embed_digits(request)

    fake.limits["max_images"] = 1
    fake.on("POST", "/embed", handler)
    with pytest.raises(InternalError):
        connect(concurrency=2).embed([b"1", b"7"] + [b"2"] * 100)
    assert len(fake.asked("/embed")) < 10


def test_embed__a_picture_that_cannot_be_read_is_the_callers_to_know(
    fake: Any, connect: Any, tmp_path: Path
) -> None:
    fake.limits["max_images"] = 1
    fake.on("POST", "/embed", embed_digits)
    with pytest.raises(FileNotFoundError):
        connect(concurrency=3).embed([b"1", b"2", tmp_path / "missing.png"])


def test_add__together_counts_what_was_answered_in_any_order(fake: Any, connect: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        (line,) = lines_in(request)
        version = 20 - int(line["id"])  # the last part is answered with an earlier version
        return httpx2.Response(200, json=ADDED | {"gallery_version": version, "updated": 0})

    fake.limits["max_images"] = 1
    fake.on("POST", "/items", handler)
    ids = [str(n) for n in range(6)]
    added = connect(concurrency=3).add([b"x"] * 6, ids=ids)
    assert (added.added, added.gallery_version) == (6, 20)
    keys = {request.headers["idempotency-key"] for request in fake.asked("/items")}
    assert len(keys) == 6


def test_neighbours__together_in_order(fake: Any, connect: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        results = [[{"id": i, "similarity": 1.0}] for i in json.loads(request.content)["ids"]]
        head = {"model": "m1", "gallery_version": 7, "exact": True}
        return httpx2.Response(200, json=head | {"results": results})

    fake.limits["max_rows"] = 2
    fake.on("POST", "/neighbours", handler)
    found = connect(concurrency=4).neighbours(ids=list("abcdefghi"))
    assert "".join(row[0].id for row in found.results) == "abcdefghi"


def test_client__concurrency_below_one(connect: Any) -> None:
    with pytest.raises(ValueError, match="concurrency must be 1 or more, got 0"):
        connect(concurrency=0)
