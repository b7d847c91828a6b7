"""What an exported encoder is on disk: a verified directory that trainer writes, service opens.

In: the ONNX graph, the weights, the input contract, what is known of the training, the training
images' embeddings. Out: a directory named by the hash of all of it, see `write_bundle`.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.representation.artifact import (
    MANIFEST,
    ArtifactError,
    file_entries,
    open_artifact,
    write_artifact,
)
from trainer.representation.neighbours import KnnGraph
from trainer.representation.preprocess import InputContract

SCHEMA = "invprop.bundle/1"
ENCODER = "encoder.onnx"
WEIGHTS = "encoder.safetensors"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
GALLERY_IDS = "gallery/ids.json"
GALLERY_EMBEDDINGS = "gallery/embeddings.npy"
GALLERY_NEIGHBOURS = "gallery/neighbours.npy"
GALLERY_SIMILARITIES = "gallery/similarities.npy"
REQUIRED_FILES = (
    ENCODER,
    WEIGHTS,
    PREPROCESSOR,
    CARD,
    GALLERY_IDS,
    GALLERY_EMBEDDINGS,
    GALLERY_NEIGHBOURS,
    GALLERY_SIMILARITIES,
)
MAX_ID_LENGTH = 512  # characters; http-api: ids are strings of 1..512 characters


class BundleError(Exception):
    """A bundle that cannot be trusted; the message names the file and what is wrong with it."""


class BundleGallery(NamedTuple):
    """The training images as items: what the service answers from the moment training ends."""

    ids: list[str]  # N different strings of 1..512 characters
    embeddings: NDArray[np.float32]  # (N, D) unit length, of the un-augmented images
    graph: KnnGraph  # (N, K) exact, on these embeddings


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file was compared with its hash."""

    directory: Path
    model_id: str  # sha256 (hex) of the canonical manifest
    contract: InputContract
    feature_dim: int  # F, of the output `features` (B, F)
    embedding_dim: int  # D, of the output `embedding` (B, D), unit length
    manifest: Mapping[str, Any]

    def encoder_onnx(self) -> bytes:
        """The serialised ONNX graph: input `images` uint8 (B, S, S, 3), outputs as above."""
        return self.read(ENCODER)

    def read(self, name: str) -> bytes:
        """The content of one of the bundle's files, checked once more as it is read."""
        content = (self.directory / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise BundleError(f"{self.directory / name} changed after the bundle was opened")
        return content

    def gallery(self) -> BundleGallery:
        """Read the training images' ids, embeddings and graph, and check that they fit."""
        try:
            ids = json.loads(self.read(GALLERY_IDS))
            embeddings, neighbours, similarities = (
                np.lib.format.read_array(io.BytesIO(self.read(name)), allow_pickle=False)
                for name in (GALLERY_EMBEDDINGS, GALLERY_NEIGHBOURS, GALLERY_SIMILARITIES)
            )
            gallery = BundleGallery(ids, embeddings, KnnGraph(neighbours, similarities))
            _check_gallery(gallery, self.embedding_dim)
        except ValueError as error:
            raise BundleError(f"{self.directory / 'gallery'}: {error}") from error
        return gallery


def write_bundle(
    directory: str | Path,
    *,
    encoder_onnx: bytes,
    weights: bytes,
    contract: InputContract,
    feature_dim: int,
    embedding_dim: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    recipe: Mapping[str, Any],
    training: Mapping[str, Any],
    parity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    card: str,
    gallery: BundleGallery,
) -> Path:
    """Write a bundle, all or nothing.

    Args:
        directory: where it will stand; an older bundle there is replaced at the very end.
        encoder_onnx: graph with input `images` uint8 (B, S, S, 3) RGB, outputs `features` (B, F)
            and `embedding` (B, D) of unit length, normalisation inside, no external data.
        weights: the same network as safetensors, for fine-tuning.
        contract: how an image becomes that input.
        feature_dim, embedding_dim: F and D.
        pixel_mean, pixel_std: three each, on the 0..1 scale: what the graph applies inside.
        recipe: the resolved recipe of the run.
        training: facts of the run, such as epochs, last losses, kNN accuracies.
        parity: measured differences between the trained network and the graph.
        provenance: versions and commit.
        card: the model card, Markdown.
        gallery: the training images.

    Raises:
        ValueError: the gallery's parts do not fit each other.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    _check_gallery(gallery, embedding_dim)
    files = {
        ENCODER: encoder_onnx,
        WEIGHTS: weights,
        PREPROCESSOR: _json(_preprocessor(contract, pixel_mean, pixel_std)),
        CARD: card.encode(),
        GALLERY_IDS: _json(gallery.ids),
        GALLERY_EMBEDDINGS: _npy(gallery.embeddings),
        GALLERY_NEIGHBOURS: _npy(gallery.graph.neighbours),
        GALLERY_SIMILARITIES: _npy(gallery.graph.similarities),
    }
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "dims": {"features": feature_dim, "embedding": embedding_dim},
        "input": contract.as_dict(),
        "recipe": recipe,
        "training": training,
        "parity": parity,
        "provenance": provenance,
        "gallery": {"images": len(gallery.ids), "k": int(gallery.graph.neighbours.shape[1])},
    }
    facts = json.loads(_json(facts))  # what a reader will see, so that the hash is the same
    facts["model_id"] = _model_id({**facts, "files": file_entries(files)})
    write_artifact(directory, files, facts)
    return Path(directory)


def open_bundle(directory: str | Path) -> Bundle:
    """Open a bundle after comparing every file with its hash.

    Raises:
        BundleError: naming the file that is missing, damaged, swapped or of an unknown schema.
    """
    directory = Path(directory)
    try:
        manifest = open_artifact(directory)
    except ArtifactError as error:
        raise BundleError(str(error)) from error
    path = directory / MANIFEST
    if manifest.get("schema") != SCHEMA:
        raise BundleError(f"{path} has schema {manifest.get('schema')!r}, wanted {SCHEMA!r}")
    missing = [name for name in REQUIRED_FILES if name not in manifest["files"]]
    if missing:
        raise BundleError(f"{path} does not list {missing[0]}")
    if manifest.get("model_id") != _model_id(manifest):
        raise BundleError(f"{path} was edited: its model_id is not the hash of its content")
    try:
        return Bundle(
            directory=directory,
            model_id=manifest["model_id"],
            contract=InputContract.from_dict(manifest["input"]),
            feature_dim=int(manifest["dims"]["features"]),
            embedding_dim=int(manifest["dims"]["embedding"]),
            manifest=manifest,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not complete: {error}") from error


def _model_id(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "model_id"}
    # ASCII, so that even text that is no valid Unicode has a hash, and an edit is told as an edit.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _check_gallery(gallery: BundleGallery, dim: int) -> None:
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


def _preprocessor(
    contract: InputContract, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """The fields that image-processor files use; the graph itself scales and normalises."""
    side = contract.size_px
    return {
        "image_processor_type": "InvpropImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": {"nearest": 0, "bilinear": 2, "bicubic": 3}[contract.resample],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "crop_pct": contract.crop_fraction,
        "do_rescale": False,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
