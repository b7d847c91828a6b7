"""The training images inside a bundle: ids, embeddings and exact kNN graph, as files.

In: a `BundleGallery`. Out: the files below gallery/, and back with all of it checked.
"""

import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.representation.neighbours import KnnGraph

GALLERY_IDS = "gallery/ids.json"
GALLERY_EMBEDDINGS = "gallery/embeddings.npy"
GALLERY_NEIGHBOURS = "gallery/neighbours.npy"
GALLERY_SIMILARITIES = "gallery/similarities.npy"
GALLERY_FILES = (GALLERY_IDS, GALLERY_EMBEDDINGS, GALLERY_NEIGHBOURS, GALLERY_SIMILARITIES)
MAX_ID_LENGTH = 512  # characters; http-api: ids are strings of 1..512 characters


class BundleGallery(NamedTuple):
    """The training images as items: what the service answers from the moment training ends."""

    ids: list[str]  # N different strings of 1..512 characters
    embeddings: NDArray[np.float32]  # (N, D) unit length, of the un-augmented images
    graph: KnnGraph  # (N, K) exact, on these embeddings


def gallery_files(gallery: BundleGallery) -> dict[str, bytes]:
    """The content of each of GALLERY_FILES."""
    return {
        GALLERY_IDS: json.dumps(gallery.ids, indent=1, ensure_ascii=False).encode(),
        GALLERY_EMBEDDINGS: _npy(gallery.embeddings),
        GALLERY_NEIGHBOURS: _npy(gallery.graph.neighbours),
        GALLERY_SIMILARITIES: _npy(gallery.graph.similarities),
    }


def gallery_from_files(read: Callable[[str], bytes], dim: int) -> BundleGallery:
    """Read the gallery of (N, dim) embeddings; `read` gives the content of a file.

    Raises:
        ValueError: a file is of another form, or they do not fit each other.
    """
    ids = json.loads(read(GALLERY_IDS))
    embeddings, neighbours, similarities = (
        np.lib.format.read_array(io.BytesIO(read(name)), allow_pickle=False)
        for name in (GALLERY_EMBEDDINGS, GALLERY_NEIGHBOURS, GALLERY_SIMILARITIES)
    )
    gallery = BundleGallery(ids, embeddings, KnnGraph(neighbours, similarities))
    check_gallery(gallery, dim)
    return gallery


def check_gallery(gallery: BundleGallery, dim: int) -> None:
    """Raise ValueError where the parts do not fit each other or are not (N, dim) of unit length."""
    ids, embeddings, graph = gallery
    if not isinstance(ids, list) or not all(
        isinstance(i, str) and 1 <= len(i) <= MAX_ID_LENGTH for i in ids
    ):
        raise ValueError(f"ids must be a list of strings of 1..{MAX_ID_LENGTH} characters")
    count = len(ids)
    if len(set(ids)) != count:
        raise ValueError("ids must differ from each other")
    if embeddings.shape != (count, dim) or embeddings.dtype != np.float32:
        raise ValueError(
            f"embeddings must be float32 ({count}, {dim}), "
            f"got {embeddings.dtype} {embeddings.shape}"
        )
    if not np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3):
        raise ValueError("embeddings must be finite and of unit length")
    neighbours, similarities = graph
    if neighbours.shape != similarities.shape or neighbours.shape[:1] != (count,):
        raise ValueError(
            f"the graph is {neighbours.shape} and {similarities.shape} for {count} ids"
        )
    if neighbours.dtype != np.int64 or similarities.dtype != np.float32:
        raise ValueError("the graph must be int64 neighbours and float32 similarities")
    if neighbours.size and (neighbours.min() < -1 or neighbours.max() >= count):
        raise ValueError("the graph names rows that are not there")
    if (neighbours == np.arange(count)[:, None]).any():
        raise ValueError("the graph has a node that is its own neighbour")


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
