"""A tiny but real bundle, and the service on it: the parts are the real ones, only small.

The encoder is a projection of the pixels, made with onnx.helper: no torch, tests stay fast.
"""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import uvicorn
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.protocol import BoundedConfig, Connections
from service.settings import Settings
from tests.service.milvus import milvus, new_collection
from tests.service.postgresql import new_database, postgresql
from trainer.representation.bundle import (
    Bundle,
    BundleGallery,
    Variant,
    open_bundle,
    write_bundle,
)
from trainer.representation.neighbours import exact_graph
from trainer.representation.preprocess import InputContract, prepare

__all__ = ["milvus", "new_collection", "new_database", "postgresql"]  # fixtures

SIDE, FEATURES, DIM, IMAGES, K = 8, 16, 12, 40, 4


def encoder_onnx(seed: int = 0) -> bytes:
    """uint8 (B, 8, 8, 3) -> features (B, 16), embedding (B, 12) of unit length."""
    generator = np.random.default_rng(seed)
    to_features = generator.standard_normal((SIDE * SIDE * 3, FEATURES)).astype(np.float32)
    to_embedding = generator.standard_normal((FEATURES, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["real"], ["flat"], axis=1),
        helper.make_node("Sub", ["flat", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "to_features"], ["features"]),
        helper.make_node("MatMul", ["features", "to_embedding"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM]),
        ],
        [
            numpy_helper.from_array(np.float32(127.3), "mean"),
            numpy_helper.from_array(to_features, "to_features"),
            numpy_helper.from_array(to_embedding, "to_embedding"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def unit_rows(count: int, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
    """Random float32 rows of unit length."""
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def build_bundle(directory: Path, *, images: int = IMAGES, seed: int = 0, **parts: Any) -> Path:
    """Write a bundle whose gallery holds random vectors with the ids train/0000.png, ..."""
    embeddings = unit_rows(images, seed=seed)
    return write_bundle(
        directory,
        encoder_onnx=encoder_onnx(seed),
        weights=b"",
        contract=InputContract(size_px=SIDE),
        feature_dim=FEATURES,
        embedding_dim=DIM,
        pixel_mean=[0.5] * 3,
        pixel_std=[0.5] * 3,
        recipe={"name": "test"},
        training={"epochs": 0},
        parity={},
        provenance={},
        card="# test\n",
        gallery=BundleGallery(
            [f"train/{i:04d}.png" for i in range(images)], embeddings, exact_graph(embeddings, K)
        ),
        **parts,
    )


def encoded(
    seed: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (20, 14), format: str = "PNG"
) -> bytes:
    """A picture of noise as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def bundle_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a gallery of 40."""
    return build_bundle(tmp_path_factory.mktemp("bundle") / "encoder")


@pytest.fixture(scope="session")
def varied_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with other weights in its int8 graph, and an fp16 one that missed its floor."""
    figures = {"cosine": {"min": 0.9991, "mean": 0.9998}, "images": 20}
    return build_bundle(
        tmp_path_factory.mktemp("varied") / "encoder",
        variants={
            "int8": Variant(encoder_onnx(seed=1), None, figures),
            "fp16": Variant(None, "its smallest cosine to fp32 is 0.9", figures),
        },
        speed={"runs": [{"images_per_s": {"fp32": 10.0, "int8": 35.0}}]},
    )


@pytest.fixture(scope="session")
def bundle(bundle_directory: Path) -> Bundle:
    """The same, opened."""
    return open_bundle(bundle_directory)


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(seed, mode=..., size=..., format=...) -> a file."""
    return encoded


@pytest.fixture(scope="session")
def random_units() -> Callable[..., NDArray[np.float32]]:
    """random_units(count, dim, seed) -> (count, dim) float32 of unit length."""
    return unit_rows


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """make_bundle(directory, images=..., seed=..., variants=...) -> a bundle."""
    return build_bundle


@dataclass
class Service:
    """A running application and what is known of its parts."""

    client: TestClient
    bundle: Bundle
    state: Path
    settings: Settings

    def embedding(self, image: bytes) -> NDArray[np.float32]:
        """The reference: prepared here, projected by numpy in float64."""
        model = onnx.load_from_string(self.bundle.encoder_onnx())
        weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        pixels = prepare(image, self.bundle.contract).reshape(-1).astype(np.float64)
        projected = (pixels - weights["mean"]) @ weights["to_features"] @ weights["to_embedding"]
        return (projected / np.linalg.norm(projected)).astype(np.float32)


def start(bundle: Bundle, state: Path, **options: object) -> Iterator[Service]:
    """Run the application until the generator ends."""
    settings = Settings.model_validate(
        {"bundle": bundle.directory, "state": state, "decoder_processes": 1, **options}
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            failure = client.app.state.runtime.failure  # type: ignore[attr-defined]
            assert failure is None, failure
        yield Service(client, bundle, state, settings)


@pytest.fixture(scope="session")
def shared_service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that change nothing."""
    yield from start(bundle, tmp_path_factory.mktemp("state"))


@pytest.fixture
def service(bundle: Bundle, tmp_path: Path) -> Iterator[Service]:
    """A service of its own for a test that changes the gallery."""
    yield from start(bundle, tmp_path / "state")


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Serve over real HTTP, as `python -m service.run` does, in a thread; gives the URL."""
    app = create_app(settings)
    runtime = app.state.runtime
    bounds = Connections(settings, runtime.metrics)
    config = BoundedConfig(app, bounds, log_config=None, access_log=False, server_header=False,
                           proxy_headers=False, lifespan="on")  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not runtime.loaded.is_set():
                assert thread.is_alive()
                assert runtime.failure is None, runtime.failure
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def served(bundle_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a service over real HTTP, for all tests that change nothing."""
    settings = Settings(
        bundle=bundle_directory, state=tmp_path_factory.mktemp("served"), decoder_processes=1
    )
    with serving(settings) as url:
        yield url


@pytest.fixture
def start_service(bundle: Bundle) -> Callable[..., Iterator[Service]]:
    """start_service(state, max_images=1, ...) -> a generator of one running service.

    Of the shared bundle, or of the one given as `of`.
    """

    def _start(state: Path, *, of: Bundle | None = None, **options: object) -> Iterator[Service]:
        return start(of or bundle, state, **options)

    return _start
