import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.representation import bundle as bundle_module
from trainer.representation.artifact import file_entries, write_artifact
from trainer.representation.bundle import (
    REQUIRED_FILES,
    BundleError,
    BundleGallery,
    Variant,
    open_bundle,
    write_bundle,
)
from trainer.representation.neighbours import KnnGraph, exact_graph
from trainer.representation.preprocess import InputContract

GOLDEN = "906b1f73ae157c4a1d37fc343ede12564bf6ca8e2b1a6566c87f8264ac07c1ba"
CONTRACT = InputContract(size_px=32, crop_fraction=0.875)
EMBEDDINGS = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float32)
GALLERY = BundleGallery(["a.png", "b/ü.png", "c", "d"], EMBEDDINGS, exact_graph(EMBEDDINGS, 2))


def written(directory: Path, **changes: Any) -> Path:
    parts: dict[str, Any] = {
        "encoder_onnx": b"the graph",
        "weights": b"the weights",
        "contract": CONTRACT,
        "feature_dim": 5,
        "embedding_dim": 2,
        "pixel_mean": (0.5, 0.25, 0.125),
        "pixel_std": (1.0, 2.0, 4.0),
        "recipe": {"name": "digits", "lr": 0.03},
        "training": {"epochs": 3, "losses": (0.5, 0.25)},
        "parity": {"max_abs": 1e-6},
        "provenance": {"commit": None},
        "card": "# card\n",
        "gallery": GALLERY,
    }
    return write_bundle(directory, **{**parts, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return written(tmp_path / "bundle")


def test_bundle__is_what_was_written(directory: Path) -> None:
    bundle = open_bundle(directory)
    assert bundle.contract == CONTRACT
    assert (bundle.feature_dim, bundle.embedding_dim) == (5, 2)
    assert bundle.encoder_onnx() == b"the graph"
    assert bundle.read("encoder.safetensors") == b"the weights"
    assert bundle.manifest["training"] == {"epochs": 3, "losses": [0.5, 0.25]}
    assert bundle.manifest["gallery"] == {"images": 4, "k": 2}
    assert bundle.read("README.md") == b"# card\n"
    gallery = bundle.gallery()
    assert gallery.ids == GALLERY.ids
    np.testing.assert_array_equal(gallery.embeddings, EMBEDDINGS)
    # Cosines of row 2 are 0.6, 0.8 and -0.6; rows 0 and 3 are opposite.
    assert gallery.graph.neighbours.tolist() == [[2, 1], [2, 0], [1, 0], [1, 2]]
    assert gallery.graph.similarities.dtype == np.float32


def test_bundle__preprocessor_states_what_the_graph_does_itself(directory: Path) -> None:
    fields = json.loads((directory / "preprocessor_config.json").read_text())
    assert fields["size"] == {"height": 32, "width": 32}
    assert fields["crop_pct"] == 0.875
    assert fields["resample"] == 2  # Pillow's number of bilinear
    assert (fields["image_mean"], fields["image_std"]) == ([0.5, 0.25, 0.125], [1.0, 2.0, 4.0])
    assert not fields["do_normalize"]
    assert not fields["do_rescale"]


def test_model_id__is_stable_over_directories_and_versions(directory: Path, tmp_path: Path) -> None:
    model_id = open_bundle(directory).model_id
    assert open_bundle(written(tmp_path / "other")).model_id == model_id
    assert open_bundle(written(directory)).model_id == model_id
    moved = directory.rename(tmp_path / "moved")
    assert open_bundle(moved).model_id == model_id
    # Golden: a change of this value means that old bundles are no longer recognised.
    assert model_id == GOLDEN


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_onnx": b"the grapH"},
        {"weights": b""},
        {"contract": InputContract(size_px=33, crop_fraction=0.875)},
        {"recipe": {"name": "digits", "lr": 0.031}},
        {"card": "# Card\n"},
        {"gallery": GALLERY._replace(ids=["a.png", "b/u.png", "c", "d"])},
    ],
)
def test_model_id__follows_every_part(
    directory: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = open_bundle(written(tmp_path / "other", **changes))
    assert other.model_id != open_bundle(directory).model_id


VARIANTS = {
    "fp16": Variant(b"the half graph", None, {"cosine": {"min": 0.9999, "mean": 1.0}}),
    "int8": Variant(None, "its smallest cosine to fp32 is 0.8", {"cosine": {"min": 0.8}}),
}
SPEED = {"runs": [{"batch": 8, "images_per_s": {"fp32": 10.5}}]}


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    return written(tmp_path / "varied", variants=VARIANTS, speed=SPEED)


def test_variants__are_there_or_say_why_not(varied: Path) -> None:
    bundle = open_bundle(varied)
    assert bundle.precisions == ("fp32", "fp16")
    assert bundle.encoder_onnx() == bundle.encoder_onnx("fp32") == b"the graph"
    assert bundle.encoder_onnx("fp16") == b"the half graph"
    assert bundle.encoder_file("fp16") == "encoder.fp16.onnx"
    assert bundle.variants == {
        "fp16": {
            "file": "encoder.fp16.onnx",
            "reason": None,
            "cosine": {"min": 0.9999, "mean": 1.0},
        },
        "int8": {
            "file": None,
            "reason": "its smallest cosine to fp32 is 0.8",
            "cosine": {"min": 0.8},
        },
    }
    with pytest.raises(BundleError, match=r"has no int8 graph: its smallest cosine .* is 0\.8"):
        bundle.encoder_onnx("int8")
    assert bundle.manifest["files"]["encoder.fp16.onnx"]["size_bytes"] == 14
    assert bundle.speed() == SPEED


def test_variants__of_a_bundle_written_before_there_were_any(directory: Path) -> None:
    bundle = open_bundle(directory)
    assert "variants" not in bundle.manifest
    assert (bundle.variants, bundle.precisions, bundle.speed()) == ({}, ("fp32",), None)
    with pytest.raises(BundleError, match="has no int8 graph: it was exported without one"):
        bundle.encoder_onnx("int8")


def test_model_id__is_of_every_variant_and_of_no_timing(varied: Path, tmp_path: Path) -> None:
    model_id = open_bundle(varied).model_id
    assert model_id != GOLDEN
    faster = {"runs": [{"batch": 8, "images_per_s": {"fp32": 99.5}}]}
    again = open_bundle(written(tmp_path / "again", variants=VARIANTS, speed=faster))
    assert again.model_id == model_id
    assert again.speed() == faster
    untimed = open_bundle(written(tmp_path / "untimed", variants=VARIANTS))
    assert untimed.model_id == model_id
    for change in (
        VARIANTS["fp16"]._replace(graph=b"the Half graph"),
        VARIANTS["fp16"]._replace(figures={"cosine": {"min": 0.9998, "mean": 1.0}}),
        VARIANTS["int8"],
    ):
        other = open_bundle(written(tmp_path / "other", variants=VARIANTS | {"fp16": change}))
        assert other.model_id != model_id


@pytest.mark.parametrize("name", ["encoder.fp16.onnx", "speed.json"])
def test_open__damaged_variant_or_timing_is_named(varied: Path, name: str) -> None:
    content = bytearray((varied / name).read_bytes())
    content[0] ^= 1
    (varied / name).write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(f"{varied / name} is damaged or was replaced")):
        open_bundle(varied)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ({"int8": {"file": "encoder.int8.onnx", "reason": None}}, "does not list the int8 graph"),
        ({"fp16": {"file": "encoder.onnx", "reason": None}}, "does not list the fp16 graph"),
        ({"int8": {"file": None, "reason": None}}, "must give each precision a file or a reason"),
        ({"int8": {}}, "must give each precision a file or a reason"),
        ({"fp16": {"file": "encoder.fp16.onnx", "reason": "both"}}, "a file or a reason"),
        ([], "must give each precision a file or a reason"),
    ],
)
def test_open__variants_written_by_somebody_else(varied: Path, variants: Any, said: str) -> None:
    path = varied / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "variants": variants}))
    _signed_again(varied)
    with pytest.raises(BundleError, match=said):
        open_bundle(varied)


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_speed__written_by_somebody_else(varied: Path, content: bytes) -> None:
    (varied / "speed.json").write_bytes(content)
    _signed_again(varied)
    with pytest.raises(BundleError, match=r"speed\.json"):
        open_bundle(varied).speed()


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_open__damaged_or_missing_file_is_named(directory: Path, name: str) -> None:
    path = directory / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(f"{path} is damaged or was replaced")):
        open_bundle(directory)
    path.unlink()
    with pytest.raises(BundleError, match=re.escape(f"{path} cannot be read")):
        open_bundle(directory)


def test_open__file_of_another_bundle(directory: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", encoder_onnx=b"graph two")  # of the same length
    shutil.copy(other / "encoder.onnx", directory / "encoder.onnx")
    with pytest.raises(BundleError, match=r"encoder\.onnx is damaged or was replaced"):
        open_bundle(directory)


def test_open__file_swapped_together_with_its_hash(directory: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", encoder_onnx=b"graph two")
    shutil.copy(other / "encoder.onnx", directory / "encoder.onnx")
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] |= {"encoder.onnx": open_bundle(other).manifest["files"]["encoder.onnx"]}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="was edited: its model_id is not the hash"):
        open_bundle(directory)


def test_open__any_flipped_byte_of_the_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    content = path.read_bytes()
    model_id = open_bundle(directory).model_id
    found = 0
    for place in np.linspace(0, len(content) - 1, 200).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 7)
        path.write_bytes(damaged)
        try:
            # White space may become other white space: then nothing was lost.
            assert open_bundle(directory).model_id == model_id
        except BundleError:
            found += 1
    assert found > 190


@pytest.mark.parametrize(
    ("key", "value"),
    [("schema", "invprop.bundle/2"), ("schema", None), ("recipe", {}), ("model_id", "0" * 64)],
)
def test_open__edited_manifest(directory: Path, key: str, value: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    said = "has schema .*, wanted 'invprop.bundle/1'" if key == "schema" else "was edited"
    with pytest.raises(BundleError, match=said):
        open_bundle(directory)


def test_open__text_that_no_file_can_hold(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": "\ud800"}))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(directory)


def test_open__another_kind_of_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "checkpoint", {"state": b"1"}, {"schema": "invprop.checkpoint/1"})
    with pytest.raises(BundleError, match=r"schema 'invprop\.checkpoint/1', wanted"):
        open_bundle(tmp_path / "checkpoint")


def test_open__required_file_that_is_not_listed(tmp_path: Path) -> None:
    write_artifact(tmp_path / "bundle", {"encoder.onnx": b"1"}, {"schema": "invprop.bundle/1"})
    with pytest.raises(BundleError, match=r"does not list encoder\.safetensors"):
        open_bundle(tmp_path / "bundle")


def test_read__file_that_changed_since(directory: Path) -> None:
    bundle = open_bundle(directory)
    (directory / "encoder.onnx").write_bytes(b"THE GRAPH")
    with pytest.raises(BundleError, match=r"encoder\.onnx changed after the bundle was opened"):
        bundle.encoder_onnx()


def _graph(neighbours: object, similarities: object) -> KnnGraph:
    return KnnGraph(np.array(neighbours, np.int64), np.array(similarities, np.float32))


_NAN = EMBEDDINGS.copy()
_NAN[2, 0] = np.nan

GALLERIES_THAT_DO_NOT_FIT = [
    (GALLERY._replace(ids=["a", "b", "c"]), r"embeddings must be float32 \(3, 2\)"),
    (GALLERY._replace(ids=["a", "b", "c", "a"]), "differ from each other"),
    (GALLERY._replace(ids=["a", "b", "c", ""]), r"a list of strings of 1\.\.512"),
    (GALLERY._replace(ids=["a", "b", "c", "x" * 513]), r"a list of strings of 1\.\.512"),
    (GALLERY._replace(ids=["a", "b", "c", 4]), r"a list of strings of 1\.\.512"),
    (GALLERY._replace(embeddings=EMBEDDINGS[:, :1]), r"float32 \(4, 2\), got float32 \(4, 1\)"),
    (GALLERY._replace(embeddings=EMBEDDINGS.astype(np.float64)), "got float64"),
    (GALLERY._replace(embeddings=_NAN), "finite and of unit length"),
    (GALLERY._replace(embeddings=EMBEDDINGS * 0), "finite and of unit length"),
    (GALLERY._replace(graph=_graph([[1], [0], [1]], [[0], [0], [1]])), "the graph is .* for 4 ids"),
    (GALLERY._replace(graph=_graph([[1], [0], [1], [2]], [[0] * 2] * 4)), "the graph is"),
    (GALLERY._replace(graph=_graph([[4], [0], [1], [2]], [[0]] * 4)), "rows that are not there"),
    (GALLERY._replace(graph=_graph([[-2], [0], [1], [2]], [[0]] * 4)), "rows that are not there"),
    (GALLERY._replace(graph=_graph([[0], [0], [1], [2]], [[0]] * 4)), "own neighbour"),
    (
        GALLERY._replace(graph=KnnGraph(np.zeros((4, 1), np.int32), np.zeros((4, 1), np.float32))),
        "int64 neighbours",
    ),
]


@pytest.mark.parametrize(("gallery", "said"), GALLERIES_THAT_DO_NOT_FIT)
def test_write__gallery_that_does_not_fit(
    tmp_path: Path, gallery: BundleGallery, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        written(tmp_path / "bundle", gallery=gallery)
    assert list(tmp_path.iterdir()) == []


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gallery/embeddings.npy", _npy(_NAN)),
        ("gallery/embeddings.npy", _npy(EMBEDDINGS[:3])),
        ("gallery/embeddings.npy", b"no array"),
        ("gallery/embeddings.npy", _npy(EMBEDDINGS)[:-3]),
        ("gallery/embeddings.npy", b""),
        ("gallery/neighbours.npy", _npy(np.array([["a"]], dtype=object))),
        ("gallery/ids.json", b"{"),
        ("gallery/ids.json", b"7"),
        ("gallery/ids.json", b'{"a": 1, "b": 2, "c": 3, "d": 4}'),
    ],
)
def test_gallery__written_by_somebody_else(directory: Path, name: str, content: bytes) -> None:
    """The hashes are right, so the bundle opens; its gallery still has to make sense."""
    (directory / name).write_bytes(content)
    manifest = _signed_again(directory)
    bundle = open_bundle(directory)
    assert bundle.manifest == manifest
    with pytest.raises(BundleError, match="gallery"):
        bundle.gallery()


def _signed_again(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    contents = {name: (directory / name).read_bytes() for name in manifest["files"]}
    manifest["files"] = file_entries(contents)
    manifest["model_id"] = bundle_module._model_id(manifest)
    path.write_text(json.dumps(manifest))
    return manifest
