"""GET /info: what is running here, on what, and within which limits."""

import importlib.metadata
import platform
import sqlite3

import faiss
import onnxruntime
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.answers import json_response
from service.galleries import database_of, generation_of
from service.openapi import problems
from service.routes.access import runtime_of
from service.schemas.groups import MAX_GROUP_K, MAX_GROUP_STEPS
from service.schemas.info import InfoAnswer
from service.schemas.neighbours import MAX_K

# What a client is told about limits, and the setting that each one comes from.
CLIENT_LIMITS = (
    "max_body_bytes",
    "max_pending_body_bytes",
    "max_url_bytes",
    "max_header_bytes",
    "max_requests_per_s",
    "max_images_per_s",
    "max_connections",
    "header_timeout_s",
    "body_timeout_s",
    "max_line_bytes",
    "max_images",
    "max_rows",
    "max_results",
    "max_image_pixels",
    "max_metadata_bytes",
    "max_page",
    "max_group_walk",
    "max_grouping_walk",
    "max_map_sample",
    "queue_size",
    "request_timeout_s",
    "decode_timeout_s",
)

router = APIRouter(tags=["info"])


@router.get(
    "/info", response_model=InfoAnswer, responses=problems(503), summary="What is running here"
)
async def info(request: Request) -> Response:
    """Facts of the model, the execution provider really in use, limits with their settings."""
    runtime = runtime_of(request)
    embedder, snapshot, settings = runtime.embedder, runtime.gallery.snapshot(), runtime.settings
    manifest = runtime.bundle.manifest if runtime.bundle is not None else {}
    return json_response(
        {
            "model": embedder.model_id,
            "gallery_version": snapshot.version,
            "dims": {"embedding": embedder.embedding_dim, "features": embedder.feature_dim},
            "input": embedder.contract.as_dict(),
            "training": manifest.get("training"),
            "parity": manifest.get("parity"),
            "execution_provider": embedder.execution_provider,
            "precision": embedder.precision,
            "variants": manifest.get("variants", {}),
            "speed": runtime.speed,
            "search": {
                **snapshot.index(),
                "device": snapshot.device,
                "exact_items": settings.exact_items,
                **generation_of(runtime.gallery),
                "max_k": MAX_K,
                "max_group_k": MAX_GROUP_K,
                "max_group_steps": MAX_GROUP_STEPS,
            },
            "gallery": {
                "items": len(snapshot),
                "version": snapshot.version,
                **database_of(runtime.gallery, runtime.switch_facts()),
                "graph": runtime.graph.status(),
            },
            "limits": {
                name: {"limit": getattr(settings, name), "setting": name} for name in CLIENT_LIMITS
            },
            "versions": {
                "invprop": importlib.metadata.version("invprop"),
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "faiss": faiss.__version__,
                "sqlite": sqlite3.sqlite_version,
            },
        }
    )
