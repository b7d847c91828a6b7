"""What a fake service answers to what it is asked, and what it was sent."""

import email.parser
import email.policy
import io
import json
from typing import Any

import httpx2
import numpy as np


def images_in(request: httpx2.Request) -> list[bytes]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + request.content)
    return [part.get_payload(decode=True) for part in message.iter_parts()]


def npy(array: Any) -> httpx2.Response:
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32))
    headers = {"Content-Type": "application/x-npy", "X-Model-Id": "m1"}
    return httpx2.Response(200, headers=headers, content=file.getvalue())


def embed_digits(request: httpx2.Request) -> httpx2.Response:
    """Embeds b"7" as (7, 0)."""
    return npy([[float(content), 0] for content in images_in(request)])


def skip_x(request: httpx2.Request) -> httpx2.Response:
    images = images_in(request)
    errors = [{"index": i, "reason": "bad"} for i, image in enumerate(images) if image == b"x"]
    rows = [None if image == b"x" else [float(image), 0.0] for image in images]
    answer = {"model": "m1", "output": "embedding", "dim": 2, "embeddings": rows}
    return httpx2.Response(200, json=answer | ({"errors": errors} if errors else {}))


ADDED = {"model": "m1", "gallery_version": 8, "added": 1, "updated": 1, "rejected": []}


def lines_in(request: httpx2.Request) -> list[dict[str, Any]]:
    assert request.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in request.content.splitlines()]


def neighbours_of_each(request: httpx2.Request) -> httpx2.Response:
    body = json.loads(request.content)
    queries = body.get("ids") or body.get("vectors") or body.get("images")
    results = [[{"id": f"near {query}", "similarity": 0.5}] for query in queries]
    head = {"model": "m1", "gallery_version": 7, "exact": True}
    return httpx2.Response(200, json=head | {"results": results})


def groups_of_each(request: httpx2.Request) -> httpx2.Response:
    member = {"id": "b", "step": 1, "via": None, "similarity": 0.5}
    results = [
        {"members": [member | {"via": i}], "reached": 4, "truncated": True}
        for i in json.loads(request.content)["ids"]
    ]
    return httpx2.Response(200, json={"model": "m1", "gallery_version": 7, "results": results})


GROUPING = {
    "model": "m1", "id": "g1", "gallery_version": 7, "k": 4, "steps": 3, "min_size": 3,
    "state": "succeeded", "created_at": 1.0, "started_at": 2.0, "finished_at": 3.0, "items": 5,
    "grouped": 4, "ungrouped": 1, "groups": 2, "message": None, "error": None, "progress": None,
}  # fmt: skip
