"""What an exported encoder is on disk: a verified directory that trainer writes, service opens.

In: the ONNX graph, the weights, the input contract, what is known of the training, the training
images' embeddings. Out: a directory named by the hash of all of it, see `write_bundle`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.representation.artifact import (
    MANIFEST,
    ArtifactError,
    file_entries,
    open_artifact,
    write_artifact,
)
from trainer.representation.bundle_gallery import (
    GALLERY_FILES,
    MAX_ID_LENGTH,
    BundleGallery,
    check_gallery,
    gallery_files,
    gallery_from_files,
)
from trainer.representation.preprocess import InputContract

__all__ = [
    "FP32",
    "MAX_ID_LENGTH",
    "REQUIRED_FILES",
    "Bundle",
    "BundleError",
    "BundleGallery",
    "Variant",
    "open_bundle",
    "write_bundle",
]

SCHEMA = "invprop.bundle/1"
ENCODER = "encoder.onnx"
WEIGHTS = "encoder.safetensors"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
REQUIRED_FILES = (
    ENCODER,
    WEIGHTS,
    PREPROCESSOR,
    CARD,
    *GALLERY_FILES,
)
# Timings of the graphs: the one file that a repeated export may write differently.
SPEED = "speed.json"
FP32 = "fp32"  # the precision of `encoder.onnx` and of the gallery's embeddings


class BundleError(Exception):
    """A bundle that cannot be trusted; the message names the file and what is wrong with it."""


class Variant(NamedTuple):
    """The encoder's graph in another precision, or why the bundle does not carry it."""

    graph: bytes | None  # with the input and outputs of `encoder.onnx`; None: left out
    reason: str | None  # in words and figures, why it was left out; None: it is there
    figures: Mapping[str, Any]  # what was measured of it, as JSON values


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file was compared with its hash."""

    directory: Path
    model_id: str  # sha256 (hex) of the canonical manifest: every weight, no timing
    contract: InputContract
    feature_dim: int  # F, of the output `features` (B, F)
    embedding_dim: int  # D, of the output `embedding` (B, D), unit length
    manifest: Mapping[str, Any]

    def encoder_onnx(self, precision: str = FP32) -> bytes:
        """The serialised ONNX graph: input `images` uint8 (B, S, S, 3), outputs as above.

        Raises:
            BundleError: the bundle does not carry that precision; says why.
        """
        return self.read(self.encoder_file(precision))

    def encoder_file(self, precision: str = FP32) -> str:
        """The name of the file that holds the graph of a precision.

        Raises:
            BundleError: the bundle does not carry it; says why.
        """
        if precision == FP32:
            return ENCODER
        if precision in self.precisions:
            return _graph_file(precision)
        reason = self.variants.get(precision, {}).get("reason", "it was exported without one")
        raise BundleError(f"{self.directory} has no {precision} graph: {reason}")

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the bundle has a graph of; `fp32` always."""
        return (FP32, *(name for name, facts in self.variants.items() if facts["file"]))

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        """What the manifest says of the other precisions that were asked for at the export.

        Each has `file` and `reason`, one of which is None, and the figures of `write_bundle`.
        Empty for bundles that were written before there were any.
        """
        variants: Mapping[str, Mapping[str, Any]] = self.manifest.get("variants", {})
        return variants

    def speed(self) -> Mapping[str, Any] | None:
        """What was timed at the export; None where nothing was."""
        if SPEED not in self.manifest["files"]:
            return None
        try:
            timed = json.loads(self.read(SPEED))
        except ValueError as error:
            raise BundleError(f"{self.directory / SPEED}: {error}") from error
        if not isinstance(timed, dict):
            raise BundleError(f"{self.directory / SPEED} must hold names and figures")
        return timed

    def read(self, name: str) -> bytes:
        """The content of one of the bundle's files, checked once more as it is read."""
        content = (self.directory / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise BundleError(f"{self.directory / name} changed after the bundle was opened")
        return content

    def gallery(self) -> BundleGallery:
        """Read the training images' ids, embeddings and graph, and check that they fit."""
        try:
            return gallery_from_files(self.read, self.embedding_dim)
        except ValueError as error:
            raise BundleError(f"{self.directory / 'gallery'}: {error}") from error


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
    variants: Mapping[str, Variant] | None = None,
    speed: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle, all or nothing.

    Equal parts give equal bundles with equal model_ids. Timings are never equal, so `speed` stands
    in a file of its own, whose hash the manifest lists and the model_id leaves out.

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
        variants: the graph in other precisions, by their names.
        speed: what was timed.

    Raises:
        ValueError: the gallery's parts do not fit each other.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    check_gallery(gallery, embedding_dim)
    files = {
        ENCODER: encoder_onnx,
        WEIGHTS: weights,
        PREPROCESSOR: _json(_preprocessor(contract, pixel_mean, pixel_std)),
        CARD: card.encode(),
        **gallery_files(gallery),
    }
    entries: dict[str, Any] = {}
    for precision, variant in (variants or {}).items():
        name = None
        if variant.graph is not None:
            name = _graph_file(precision)
            files[name] = variant.graph
        entries[precision] = {"file": name, "reason": variant.reason, **variant.figures}
    if speed is not None:
        files[SPEED] = _json(speed)
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
    if entries:  # without any, the manifest is what it was before there were variants
        facts["variants"] = entries
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
    for precision, variant in _variants_of(manifest, path).items():
        name = variant["file"]
        if name is not None and (name != _graph_file(precision) or name not in manifest["files"]):
            raise BundleError(f"{path} does not list the {precision} graph {name!r}")
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


def _graph_file(precision: str) -> str:
    return ENCODER if precision == FP32 else f"encoder.{precision}.onnx"


def _variants_of(manifest: Mapping[str, Any], path: Path) -> Mapping[str, Mapping[str, Any]]:
    variants = manifest.get("variants", {})
    if not isinstance(variants, dict) or not all(
        isinstance(entry, dict) and (entry.get("file") is None) != (entry.get("reason") is None)
        for entry in variants.values()
    ):
        raise BundleError(f"{path}: `variants` must give each precision a file or a reason")
    return variants


def _model_id(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "model_id"}
    content["files"] = {name: e for name, e in manifest["files"].items() if name != SPEED}
    # ASCII, so that even text that is no valid Unicode has a hash, and an edit is told as an edit.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


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
