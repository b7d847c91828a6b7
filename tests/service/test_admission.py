"""service.admission: what is refused before it is read, and what bodies may take together."""

import asyncio
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.types import Message

from service.admission import Admit, Rates, json_bytes_in_memory
from service.auth import CALLER, Caller
from service.errors import Problem
from service.keys import make_key
from service.metrics import Metrics
from service.settings import Settings

CALLERS = [Caller(name, "127.0.0.1", False) for name in ("a", "b")]


def settings(**options: Any) -> Settings:
    return Settings.model_validate({"bundle": "b", "state": "s", **options})


def make_admit(app: Any, **options: Any) -> tuple[Admit, Metrics]:
    metrics, chosen = Metrics(), settings(**options)
    return Admit(app, settings=chosen, rates=Rates(chosen), metrics=metrics), metrics


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed",
        "query_string": b"", "headers": list(headers), CALLER: CALLERS[0],
    }  # fmt: skip


async def send_chunks(admit: Admit, scope: dict[str, Any], chunks: list[bytes]) -> list[Message]:
    """Send a body in chunks and return the answer's messages."""
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await admit(scope, receive, send)
    return sent


async def read_all(scope: Any, receive: Any, send: Any) -> None:
    try:
        while (await receive())["more_body"]:
            pass
    except Problem as problem:
        await problem.response()(scope, receive, send)


def pending(metrics: Metrics) -> float | None:
    known = metrics.registry
    return known.get_sample_value("invprop_pending_body_bytes")


def test_bodies__count_twice_until_their_request_is_answered() -> None:
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        seen.append(pending(metrics))

    admit, metrics = make_admit(app)
    asyncio.run(send_chunks(admit, scope_of(), [b"x" * 1000]))
    assert seen == [2000]
    assert pending(metrics) == 0


def test_bodies__of_all_requests_are_bounded_together() -> None:
    options = {"max_body_bytes": 1024, "max_pending_body_bytes": 2048 + 100}
    read, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if read.is_set():
            await read_all(scope, receive, send)
        else:
            await receive()
            read.set()
            await go_on.wait()

    admit, metrics = make_admit(app, **options)

    async def both() -> tuple[list[Message], list[Message]]:
        first = asyncio.create_task(send_chunks(admit, scope_of(), [b"x" * 1024]))
        await read.wait()
        second = await send_chunks(admit, scope_of(), [b"x" * 51])
        announced = await send_chunks(admit, scope_of((b"content-length", b"51")), [])
        go_on.set()
        await first
        return second, announced

    for answer in asyncio.run(both()):
        assert answer[0]["status"] == 429
        problem = orjson.loads(answer[1]["body"])
        assert (problem["code"], problem["setting"]) == ("queue_full", "max_pending_body_bytes")
        assert (b"retry-after", b"1") in answer[0]["headers"]
    assert pending(metrics) == 0


def test_bodies__that_lie_about_their_size_are_refused_by_the_real_one() -> None:
    admit, metrics = make_admit(read_all, max_body_bytes=2000)
    lie = scope_of((b"content-length", b"10"))
    answer = asyncio.run(send_chunks(admit, lie, [b"x" * 1000] * 3))
    assert answer[0]["status"] == 413
    assert orjson.loads(answer[1]["body"])["setting"] == "max_body_bytes"
    assert pending(metrics) == 0


def test_bodies__of_json_count_what_their_values_become() -> None:
    admit, _ = make_admit(read_all, max_body_bytes=100_000, max_pending_body_bytes=1_000_000)
    hostile = b"[" + b"[]," * 20_000 + b"[]]"
    answer = asyncio.run(send_chunks(admit, scope_of((b"content-type", b"application/json")),
                                     [hostile]))  # fmt: skip
    assert answer[0]["status"] == 413
    assert orjson.loads(answer[1]["body"])["setting"] == "max_pending_body_bytes"
    # The same bytes as a picture take what they are.
    picture = scope_of((b"content-type", b"image/png"))
    assert asyncio.run(send_chunks(admit, picture, [hostile])) == []


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"[]," * 20_000 + b"[]]",
        b"[" + b"{}," * 20_000 + b"{}]",
        b"[" + b"0.5," * 20_000 + b"0.5]",
        b"[" + b"1234567," * 20_000 + b"1]",
        b"[" + b'"ab",' * 20_000 + b'"ab"]',
        b"[" + b'{"a":{"b":[1.5,2.5]}},' * 5_000 + b"[]]",
        b"[" + b"[" * 1000 + b"]" * 1000 + b"]",
        b"{" + b",".join(b'"k%d":1.5' % n for n in range(20_000)) + b"}",
    ],
    ids=lambda text: text[:12].decode(),
)
def test_estimate__is_not_below_what_the_values_take(text: bytes) -> None:
    orjson.loads(text)  # keys that stay in a cache
    tracemalloc.start()
    try:
        value = orjson.loads(text)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert value
    # The copies of the text, which the text's own bytes are counted for, hold the strings.
    assert taken <= json_bytes_in_memory(text) + 2 * len(text) + 1000


def test_urls__have_a_length(shared_service: Any) -> None:
    answer = shared_service.client.get("/items?cursor=" + "1" * 20_000)
    assert (answer.status_code, answer.json()["code"]) == (414, "url_too_long")
    assert (answer.json()["limit"], answer.json()["setting"]) == (16_384, "max_url_bytes")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
def test_encodings__of_bodies_are_refused(shared_service: Any, encoding: str) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "image/png"}
    answer = shared_service.client.post("/embed", content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def take_requests(rates: Rates, caller: Caller, count: int) -> None:
    for _ in range(count):
        rates.take_request(caller)


def test_rates__count_each_caller_for_itself() -> None:
    rates = Rates(settings(max_requests_per_s=2))
    for caller in CALLERS:
        rates.take_request(caller)
        rates.take_request(caller)
        with pytest.raises(Problem) as refused:
            take_requests(rates, caller, 3)  # more than one place cannot have become free
        assert refused.value.code == "rate_limited"
        assert refused.value.extensions == {"limit": 2, "setting": "max_requests_per_s"}
        assert refused.value.retry_after_s == 1


def test_rates__are_off_by_default() -> None:
    rates = Rates(settings())
    for _ in range(10_000):
        rates.take_request(CALLERS[0])
        rates.take_images(1000)


def test_rates__bound_images_of_each_key(start_service: Any, tmp_path: Path, picture: Any) -> None:
    keys = [make_key(name, "read") for name in ("a", "b")]
    options = {"max_images": 4, "max_images_per_s": 1, "api_keys": ";".join(k[1] for k in keys)}
    (first, _), (second, _) = keys
    for service in start_service(tmp_path, **options):
        assert [post(service, first, picture(), n).status_code for n in (4, 4, 2)] == [200] * 3
        refused = post(service, first, picture(), 4)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert refused.json()["setting"] == "max_images_per_s"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert post(service, second, picture(), 4).status_code == 200
        assert service.client.get("/livez").status_code == 200


def post(service: Any, key: str, picture: bytes, count: int) -> Any:
    images = [("images", ("a", picture))] * count
    return service.client.post("/embed", files=images, headers={"X-API-Key": key})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_images_per_s": 25}, "max_images = 256 is larger than 10 s of"),
        ({"max_pending_body_bytes": 2**20}, "smaller than twice max_body_bytes"),
    ],
)
def test_settings__that_could_never_admit_anything_are_errors(
    options: dict[str, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        settings(**options)
