from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from client.errors import ConnectionFailed, QueueFull, ServiceError, TimedOut
from client.retry import (
    IDEMPOTENCY_KEY,
    Answer,
    Clock,
    Request,
    RetryPolicy,
    Route,
    Wait,
    exchange,
)

OK = {"gallery_version": 1, "model": "m1", "id": "a", "metadata": {}}


def failing(times: int, failure: Callable[[], httpx2.Response]) -> Callable[[Any], httpx2.Response]:
    left = [times]

    def handler(_: httpx2.Request) -> httpx2.Response:
        if left[0] > 0:
            left[0] -= 1
            return failure()
        return httpx2.Response(200, json=OK)

    return handler


def lost() -> httpx2.Response:
    raise httpx2.ReadError("reset")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_exchange__statuses_that_pass_are_asked_again(fake: Any, service: Any, status: int) -> None:
    fake.on("GET", "/items/a", failing(3, lambda: httpx2.Response(status)))
    assert service.item("a").id == "a"
    assert fake.time.waits == [0.5, 1.0, 2.0]  # the highest of 0..0.5, 0..1, 0..2


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 500, 501, 507])
def test_exchange__other_statuses_are_final(fake: Any, service: Any, status: int) -> None:
    fake.on("GET", "/items/a", httpx2.Response(status))
    with pytest.raises(ServiceError):
        service.item("a")
    assert len(fake.requests) == 1


def test_exchange__a_lost_connection_is_tried_again(fake: Any, service: Any) -> None:
    fake.on("GET", "/items/a", failing(2, lost))
    assert service.item("a").id == "a"
    assert fake.time.waits == [0.5, 1.0]


def test_exchange__gives_up_after_max_retries_with_the_last_failure(
    fake: Any, connect: Any
) -> None:
    fake.on("GET", "/items/a", httpx2.Response(429, json={"code": "queue_full", "detail": "full"}))
    with pytest.raises(QueueFull, match="full"):
        connect(max_retries=2).item("a")
    assert len(fake.requests) == 3


def test_exchange__no_retries_when_none_are_wanted(fake: Any, connect: Any) -> None:
    fake.on("GET", "/items/a", lambda _: lost())
    with pytest.raises(ConnectionFailed, match="GET http://fake/items/a: reset"):
        connect(max_retries=0).item("a")
    assert fake.time.waits == []


def test_exchange__a_silent_service_is_timed_out(fake: Any, connect: Any) -> None:
    def silent(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("")

    fake.on("GET", "/items/a", silent)
    with pytest.raises(TimedOut, match="silent for 2 s"):
        connect(timeout_s=2, max_retries=0).item("a")


@pytest.mark.parametrize("value", ["7", "Tue, 14 Nov 2023 22:13:27 GMT"])
def test_exchange__waits_as_long_as_retry_after_says(fake: Any, service: Any, value: str) -> None:
    answer = failing(1, lambda: httpx2.Response(503, headers={"Retry-After": value}))
    fake.on("GET", "/items/a", answer)
    service.item("a")
    assert fake.time.waits == [7.5]  # and the jitter of the first attempt on top


def test_exchange__a_wait_past_the_total_deadline_is_not_begun(fake: Any, connect: Any) -> None:
    fake.on("GET", "/items/a", httpx2.Response(429, headers={"Retry-After": "40"}))
    with pytest.raises(ServiceError) as raised:
        connect(timeout_s=10, max_retries=3).item("a")  # 40 s in all
    assert raised.value.retry_after_s == 40
    assert fake.time.waits == []


def test_exchange__the_last_attempt_has_only_the_rest_of_the_deadline() -> None:
    seconds = [0.0]
    clock = Clock(monotonic=lambda: seconds[0], uniform=lambda low, high: high)
    steps = exchange(Request(Route("GET", "/x"), "/x"), RetryPolicy(10, 1, clock))  # 20 s in all
    assert next(steps).timeout_s == 10  # type: ignore[union-attr]
    seconds[0] = 14.0  # a trickle of data kept the first attempt alive
    assert steps.throw(ConnectionFailed("lost")) == Wait(0.5)
    seconds[0] = 14.5
    assert next(steps).timeout_s == 5.5  # type: ignore[union-attr]


def test_exchange__the_longest_wait_is_bounded(fake: Any, connect: Any) -> None:
    fake.on("GET", "/items/a", httpx2.Response(503))
    with pytest.raises(ServiceError):
        connect(max_retries=7).item("a")
    assert fake.time.waits == [0.5, 1, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("headers", [{}, {IDEMPOTENCY_KEY: "k"}])
def test_exchange__a_write_is_repeated_only_with_a_key(headers: dict[str, str]) -> None:
    route = Route("POST", "/items", repeatable=False)
    steps = exchange(Request(route, "/items", headers=headers), RetryPolicy())
    next(steps)
    if headers:
        assert isinstance(steps.throw(ConnectionFailed("lost")), Wait)
    else:
        with pytest.raises(ConnectionFailed):
            steps.throw(ConnectionFailed("lost"))


def test_exchange__a_write_without_a_key_is_not_repeated_after_503() -> None:
    route = Route("POST", "/items", repeatable=False)
    steps = exchange(Request(route, "/items"), RetryPolicy())
    next(steps)
    with pytest.raises(ServiceError):
        steps.send(Answer(503, {}, b""))


def test_add__every_attempt_of_a_part_has_the_same_key(fake: Any, service: Any) -> None:
    ok = {"model": "m1", "gallery_version": 1, "added": 1, "updated": 0, "rejected": []}
    left = [1]

    def handler(_: httpx2.Request) -> httpx2.Response:
        if left[0]:
            left[0] = 0
            return lost()
        return httpx2.Response(200, json=ok)

    fake.limits["max_rows"] = 1
    fake.on("POST", "/items", handler)
    service.add(vectors=[[1, 2], [3, 4]], ids=["a", "b"])
    keys = [request.headers[IDEMPOTENCY_KEY] for request in fake.asked("/items")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(("timeout_s", "max_retries"), [(0, 3), (-1, 3), (1, -1)])
def test_client__values_out_of_range(connect: Any, timeout_s: float, max_retries: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        connect(timeout_s=timeout_s, max_retries=max_retries)
