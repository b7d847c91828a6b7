"""What keys, policy, rates, budgets, security headers and log line cost a request, in CPU time.

    python tests/benchmarks/admission_cost.py

The layers of the application around one that answers at once, called as a server calls them; beside
it the same application bare. Interleaved; CPU microseconds for each request, median.
"""

import asyncio
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import structlog

from service.admission import Admit, Rates
from service.auth import Authorise
from service.keys import ApiKeys, make_key
from service.metrics import Metrics
from service.observability import ObserveRequests
from service.policy import Policy
from service.settings import Settings

ROUNDS, REQUESTS = 9, 1000
KEY, LINE = make_key("caller", "read")
OTHERS = ";".join([LINE, *(make_key(f"k{n}", "read")[1] for n in range(20))])


async def application(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def layers(**options: Any) -> Any:
    settings = Settings(bundle=Path("b"), state=Path("s"), **options)
    metrics = Metrics()
    inner = Admit(application, settings=settings, rates=Rates(settings), metrics=metrics)
    keys = ApiKeys(settings.api_keys, None)
    guarded = Authorise(inner, keys=keys, policy=Policy())
    return ObserveRequests(guarded, metrics=metrics)


async def cpu_us(app: Any, headers: list[tuple[bytes, bytes]], body: bytes) -> float:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pass

    started = time.process_time()
    for _ in range(REQUESTS):
        scope = {
            "type": "http", "method": "POST", "path": "/neighbours", "raw_path": b"/neighbours",
            "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await app(scope, receive, send)
    return (time.process_time() - started) / REQUESTS * 1e6


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    plain = [
        (b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"40"),
        (b"accept", b"*/*"), (b"user-agent", b"x"),
    ]  # fmt: skip
    keyed = [*plain, (b"authorization", f"Bearer {KEY}".encode())]
    body, picture = b'{"ids":["a"],"k":10,"include":[]}       ', b'{"images":["' + b"A" * 65_000
    arms: dict[str, tuple[Any, Any, bytes]] = {
        "bare": (application, plain, body),
        "no keys": (layers(), plain, body),
        "21 keys": (layers(api_keys=OTHERS), keyed, body),
        "21 keys, both rates": (
            layers(api_keys=OTHERS, max_requests_per_s=10**6, max_images_per_s=10**6), keyed, body
        ),
        "no keys, 64 KB of JSON with an image": (layers(), plain, picture),
    }  # fmt: skip
    seen: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            seen[name].append(asyncio.run(cpu_us(*arm)))
    for name, values in seen.items():
        print(
            f"{name}: {statistics.median(values):.1f} us (of {min(values):.1f}-{max(values):.1f})"
        )


if __name__ == "__main__":
    main()
