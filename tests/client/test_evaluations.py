"""Evaluations and data sets, for both clients."""

import json
from typing import Any

import httpx2
import pytest

from client import ConnectionFailed, Dataset, RouteNotFound, TimedOut, UnexpectedAnswer

QUEUED = {"id": "e1", "status": "queued", "progress": None, "attempts": 0, "created_at": 1.0}


def state(status: str, **more: Any) -> dict[str, Any]:
    return QUEUED | {"status": status} | more


def stream(*events: dict[str, Any]) -> httpx2.Response:
    text = ": hello\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, text=text)


def test_datasets(fake: Any, service: Any) -> None:
    listed = {"name": "birds", "kind": "classes", "classes": 3, "counts": {"train": 9}}
    listed |= {"state": "ready", "class_names": ["a", "b", "c"]}
    fake.on("GET", "/datasets", httpx2.Response(200, json={"items": [listed]}))
    assert service.datasets() == (
        Dataset("birds", "classes", 3, {"train": 9}, "ready", class_names=("a", "b", "c")),
    )


def test_submit__sends_a_key_so_that_it_may_be_sent_again(fake: Any, service: Any) -> None:
    answers = iter([httpx2.Response(503), httpx2.Response(202, json=QUEUED)])
    fake.on("POST", "/evaluations", lambda _: next(answers))
    found = service.evaluations.submit("knn", "birds", settings={"k": 5}, seed=3)
    assert (found.id, found.status, found.ended) == ("e1", "queued", False)
    body = {"protocol": "knn", "dataset": "birds", "settings": {"k": 5}, "seed": 3}
    assert fake.bodies("/evaluations") == [body, body]
    first, second = (r.headers["idempotency-key"] for r in fake.asked("/evaluations"))
    assert first == second
    fake.on("POST", "/evaluations", httpx2.Response(202, json=QUEUED))
    service.evaluations.submit("knn", "birds", idempotency_key="mine")
    assert fake.asked("/evaluations")[-1].headers["idempotency-key"] == "mine"


def test_list__pages_are_followed(fake: Any, service: Any) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        after = None if "cursor" in request.url.params else "2"
        return httpx2.Response(200, json={"items": [QUEUED], "next": after})

    fake.on("GET", "/evaluations", handler)
    assert [e.id for e in service.evaluations.list(status="queued")] == ["e1", "e1"]
    assert [dict(request.url.params) for request in fake.asked("/evaluations")] == [
        {"status": "queued"},
        {"status": "queued", "cursor": "2"},
    ]


def test_cancel(fake: Any, service: Any) -> None:
    fake.on("DELETE", "/evaluations/e1", httpx2.Response(202, json=state("cancelled")))
    assert service.evaluations.cancel("e1").ended


def test_wait__asks_until_it_has_ended(fake: Any, service: Any) -> None:
    states = iter(["queued", "running", "running", "succeeded"])
    fake.on(
        "GET",
        "/evaluations/e1",
        lambda _: httpx2.Response(200, json=state(next(states), report={"top1": 0.5})),
    )
    found = service.evaluations.wait("e1")
    assert (found.status, found.report) == ("succeeded", {"top1": 0.5})
    assert fake.time.waits == pytest.approx([0.2, 0.3, 0.45])


def test_wait__gives_up_in_time_and_says_that_it_goes_on(fake: Any, service: Any) -> None:
    fake.on("GET", "/evaluations/e1", httpx2.Response(200, json=state("running")))
    with pytest.raises(TimedOut, match="still running after 20 s; it goes on"):
        service.evaluations.wait("e1", timeout_s=20)
    assert 10 < sum(fake.time.waits) <= 20


def test_events__until_it_has_ended(fake: Any, service: Any) -> None:
    fake.on("GET", "/evaluations/e1/events", stream(state("running"), state("failed", error="x")))
    found = list(service.evaluations.events("e1"))
    assert [(e.status, e.error) for e in found] == [("running", None), ("failed", "x")]
    assert fake.requests[-1].headers["accept"] == "text/event-stream"


def test_events__a_broken_stream_is_taken_up_again(fake: Any, service: Any) -> None:
    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("restarting")

    answers = iter(
        [
            lambda _: stream(state("running")),
            refuse,
            lambda _: httpx2.Response(503),
            lambda _: stream(state("succeeded")),
        ]
    )
    fake.on("GET", "/evaluations/e1/events", lambda request: next(answers)(request))
    assert [e.status for e in service.evaluations.events("e1")] == ["running", "succeeded"]
    assert fake.time.waits == [0.5, 1.0, 2.0]


def test_events__that_never_come_are_given_up(fake: Any, connect: Any) -> None:
    fake.on("GET", "/evaluations/e1/events", lambda _: stream())
    with pytest.raises(ConnectionFailed, match="ended before the evaluation did"):
        list(connect(max_retries=2).evaluations.events("e1"))
    assert len(fake.asked("/evaluations/e1/events")) == 3


@pytest.mark.parametrize(
    "answer", [httpx2.Response(200, text="<html>"), stream({"no": "status"})], ids=["html", "json"]
)
def test_events__that_are_not_this_api(fake: Any, service: Any, answer: httpx2.Response) -> None:
    content, headers = answer.content, answer.headers
    fake.on(
        "GET",
        "/evaluations/e1/events",
        lambda _: httpx2.Response(200, headers=headers, content=content),
    )
    with pytest.raises(UnexpectedAnswer):
        list(service.evaluations.events("e1"))


def test_events__of_a_service_without_them(fake: Any, service: Any) -> None:
    problem = {"code": "not_found", "detail": "no such route"}
    fake.on("GET", "/evaluations/e1/events", httpx2.Response(404, json=problem))
    with pytest.raises(RouteNotFound):
        list(service.evaluations.events("e1"))
    fake.on("GET", "/datasets", httpx2.Response(404, json=problem))
    with pytest.raises(RouteNotFound) as raised:
        service.datasets()
    assert "may be without GET /datasets" in raised.value.__notes__[0]
