"""service.observability: what stands in every answer, what is measured, what is never written."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message
from structlog.testing import capture_logs

from service.metrics import Metrics
from service.observability import ObserveRequests, watch_event_loop

# What the design asks for, and what it calls them.
WANTED = {
    "invprop_requests", "invprop_request_duration_seconds", "invprop_queue_size",
    "invprop_batch_size", "invprop_queue_duration_seconds", "invprop_inference_duration_seconds",
    "invprop_decode_duration_seconds", "invprop_search_duration_seconds",
    "invprop_index_vectors", "invprop_gallery_version", "invprop_build_info",
    "invprop_problems", "invprop_connections", "invprop_connections_closed",
    "invprop_pending_body_bytes", "invprop_event_loop_lag_seconds", "invprop_images_rejected",
    "invprop_decoders_replaced", "process_resident_memory_bytes", "process_open_fds",
}  # fmt: skip
LABELS = {
    "method", "route", "status", "code", "reason", "le", "version", "model",
    "execution_provider", "precision", "kind", "queue",
}  # fmt: skip


def test_metrics__are_those_of_the_design_and_carry_no_user_data(
    service: Any, picture: Callable[..., bytes]
) -> None:
    secret = "s3cret"
    client = service.client
    client.post("/items", files={"images": (secret, picture())})
    client.get(f"/items/{secret}")
    client.get(f"/items?filter={secret}")
    client.request(secret.upper(), f"/{secret}", headers={"X-Request-Id": secret})
    client.post("/neighbours", json={"ids": [secret + "-2"], secret: 1})
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) >= WANTED
    assert secret not in text.lower()
    used = {name for f in families.values() for s in f.samples for name in s.labels}
    assert used <= LABELS
    problems = {s.labels["code"]: s.value for s in families["invprop_problems"].samples if
                s.name.endswith("_total")}  # fmt: skip
    problems.pop("not_ready", None)  # while it started
    assert problems == {"invalid_request": 1, "not_found": 1, "bad_request": 1}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/livez"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
        ("PUT", "/items"),
        ("POST", "/embed"),
    ],
)
def test_answers__carry_the_security_headers(shared_service: Any, method: str, path: str) -> None:
    headers = shared_service.client.request(method, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "server" not in headers
    assert not [name for name in headers if name.startswith("access-control")]
    assert headers["x-request-id"]


def test_event_loop__that_is_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.observability._LAG_EVERY_S", 0.0)
    metrics = Metrics()

    async def watch() -> None:
        watching = asyncio.create_task(watch_event_loop(metrics))
        known = metrics.registry
        while not known.get_sample_value("invprop_event_loop_lag_seconds_count"):
            await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(watch())


def test_client__that_goes_away_is_no_defect(
    shared_service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = shared_service.client

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("there is nobody to send to")

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/embed",
        "raw_path": b"/embed", "query_string": b"", "root_path": "", "scheme": "http",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        "headers": [(b"content-type", b"image/png"), (b"content-length", b"10")],
    }  # fmt: skip
    client.portal.call(client.app, scope, receive, send)
    written = "".join(capsys.readouterr())
    assert "499" in written
    assert "unexpected_error" not in written
    assert "Traceback" not in written


def test_log__has_one_line_for_each_request(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody asked")

    scope = {"type": "http", "method": "GET", "path": "/secret", "headers": []}
    asyncio.run(ObserveRequests(app, metrics=Metrics())(scope, receive, send))
    written = "".join(capsys.readouterr())
    assert written.count("request ") == 1
    assert "secret" not in written
    assert "204" in written
    assert json.dumps([m["type"] for m in sent]) == (
        '["http.response.start", "http.response.body"]'
    )


def test_log__has_probes_that_are_well_for_debugging_only(service: Any) -> None:
    with capture_logs() as logs:
        assert service.client.get("/readyz").is_success
        assert service.client.get("/info").is_success
        service.client.app.state.runtime.draining = True
        assert service.client.get("/readyz").status_code == 503
    levels = [line["log_level"] for line in logs if line["event"] == "request"]
    assert levels == ["debug", "info", "warning"]
