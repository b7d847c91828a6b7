"""service.runtime: the event loop stays free, bounds hold, deadlines end what takes too long."""

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from service.app import create_app
from service.embedder import Embedded, OnnxEmbedder
from service.gallery.logged import LoggedGallery
from service.settings import Settings
from trainer.representation.bundle import Bundle
from trainer.representation.preprocess import InputContract


class GatedEmbedder:
    """Constant embeddings, given only when the gate is open: an encoder that blocks its thread."""

    model_id, embedding_dim, feature_dim = "fake", 12, 16
    contract, execution_provider = InputContract(size_px=8), "CPUExecutionProvider"
    precision = "fp32"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.seen = 0

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.stack(images)

    def run(self, batch: NDArray[np.uint8]) -> Embedded:
        self.seen += len(batch)
        self.entered.set()
        assert self.gate.wait(30)
        count = len(batch)
        return Embedded(np.eye(12, dtype=np.float32)[[0] * count], np.ones((count, 16), np.float32))

    def finish(self, raw: Embedded) -> Embedded:
        return raw


class NoGallery:
    """A gallery with nothing in it that nobody may change."""

    model_id = "fake"

    def snapshot(self) -> Any:
        return self

    version, device = 0, "cpu"

    def trouble(self) -> None:
        return None

    def on_change(self, listener: Any) -> None:
        pass

    def index(self) -> dict[str, Any]:
        return {"index": "flat", "exact": True, "effort": 0, "bytes": 0}

    def __len__(self) -> int:
        return 0


@contextlib.asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        await app.state.runtime.loaded.wait()
        yield client


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state directory of `app_with` is one of the test."""
    monkeypatch.chdir(tmp_path)


def app_with(embedder: Any, **options: object) -> FastAPI:
    settings = Settings.model_validate(
        {"bundle": Path("x"), "state": Path("y"), "decoder_processes": 1, "graph_neighbours": 0}
        | options
    )
    return create_app(settings, embedder=embedder, gallery=NoGallery())  # type: ignore[arg-type]


def pixels(count: int) -> dict[str, Any]:
    body = io.BytesIO()
    np.save(body, np.zeros((count, 8, 8, 3), np.uint8))
    return {"content": body.getvalue(), "headers": {"Content-Type": "application/x-npy"}}


def test_loop__answers_while_the_encoder_blocks() -> None:
    async def check() -> None:
        embedder = GatedEmbedder()
        async with client_of(app_with(embedder, inference_threads=1)) as client:
            embedding = asyncio.create_task(client.post("/embed", **pixels(1)))
            await asyncio.to_thread(embedder.entered.wait, 30)
            for path in ("/livez", "/readyz", "/info"):
                assert (await client.get(path)).status_code == 200
            assert not embedding.done()
            embedder.gate.set()
            assert (await embedding).status_code == 200

    asyncio.run(asyncio.wait_for(check(), 60))


def test_queue__full_is_429_with_retry_after_and_frees_itself() -> None:
    async def check() -> None:
        embedder = GatedEmbedder()
        options = {"inference_threads": 1, "queue_size": 3, "max_images": 3}
        async with client_of(app_with(embedder, **options)) as client:
            first = asyncio.create_task(client.post("/embed", **pixels(2)))
            await asyncio.to_thread(embedder.entered.wait, 30)
            refused = await client.post("/embed", **pixels(2))
            document = refused.json()
            assert (refused.status_code, document["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            assert (document["limit"], document["setting"]) == (3, "queue_size")
            embedder.gate.set()
            assert (await first).status_code == 200
            assert (await client.post("/embed", **pixels(3))).status_code == 200

    asyncio.run(asyncio.wait_for(check(), 60))


def test_deadline__is_504_and_what_waited_is_never_run() -> None:
    async def check() -> None:
        embedder = GatedEmbedder()
        options = {"inference_threads": 1, "request_timeout_s": 0.2}
        async with client_of(app_with(embedder, **options)) as client:
            first = asyncio.create_task(client.post("/embed", **pixels(1)))
            await asyncio.to_thread(embedder.entered.wait, 30)
            late = await client.post("/embed", **pixels(5))
            document = late.json()
            assert (late.status_code, document["code"]) == (504, "deadline_exceeded")
            assert (document["limit"], document["setting"]) == (0.2, "request_timeout_s")
            assert (await first).status_code == 504
            embedder.gate.set()
            assert (await client.post("/embed", **pixels(1))).status_code == 200
            assert embedder.seen == 2  # the five were dropped

    asyncio.run(asyncio.wait_for(check(), 60))


def test_searches__are_bounded_too(
    bundle: Bundle, tmp_path: Path, monkeypatch: Any, random_units: Callable[..., Any]
) -> None:
    from service.gallery.faiss_index import FaissSnapshot

    entered, gate = threading.Event(), threading.Event()
    search = FaissSnapshot.search

    def gated(self: FaissSnapshot, *arguments: Any, **options: Any) -> Any:
        entered.set()
        assert gate.wait(30)
        return search(self, *arguments, **options)

    monkeypatch.setattr(FaissSnapshot, "search", gated)

    async def check() -> None:
        gallery = LoggedGallery(tmp_path, bundle)
        settings = Settings.model_validate(
            {"bundle": bundle.directory, "state": tmp_path, "search_threads": 2, "max_pending": 1}
            | {"graph_neighbours": 0}  # whose searches would be at the gate too
        )
        embedder = OnnxEmbedder(bundle, execution_provider="cpu")
        app = create_app(settings, embedder=embedder, gallery=gallery)
        # With metadata, so that it is not one of the short ones that nobody waits for.
        body = {"vectors": random_units(1, 12).tolist(), "include": ["metadata"]}
        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/neighbours", json=body))
            await asyncio.to_thread(entered.wait, 30)
            assert (await client.get("/livez")).status_code == 200
            refused = await client.post("/neighbours", json=body)
            assert (refused.status_code, refused.json()["setting"]) == (429, "max_pending")
            gate.set()
            assert (await first).status_code == 200
        gallery.close()  # a gallery that was given is not closed by the application

    asyncio.run(asyncio.wait_for(check(), 60))


def test_application__releases_its_state(
    start_service: Any, bundle: Bundle, tmp_path: Path
) -> None:
    for service in start_service(tmp_path):
        assert service.client.get("/items").is_success
    LoggedGallery(tmp_path, bundle).close()  # refused if the lock were still held


def test_storage__that_fails_is_507_or_503_and_searches_go_on(
    service: Any, monkeypatch: Any
) -> None:
    from service.gallery import logged
    from service.gallery.protocol import StorageError

    line = {"content": b'{"id": "a", "vector": [1,0,0,0,0,0,0,0,0,0,0,0]}'}
    headers = {"Content-Type": "application/x-ndjson"}
    for full, status, code in ((True, 507, "storage_full"), (False, 503, "storage_failed")):

        def refuse(*_: Any, full: bool = full, **__: Any) -> int:
            raise StorageError("no", full=full)

        with monkeypatch.context() as broken:
            broken.setattr(logged.Writing, "append", refuse)
            answer = service.client.post("/items", headers=headers, **line)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert service.client.post("/neighbours", json={"ids": ["train/0000.png"]}).is_success
    assert service.client.post("/items", headers=headers, **line).json()["added"] == 1
