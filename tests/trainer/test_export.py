import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from trainer import export, onnx_graph, variants
from trainer.config import EncoderConfig, ExportConfig
from trainer.encoder import PIXEL_MEAN, Encoder, build_encoder, embed_images
from trainer.export import ExportError, checkout_commit, export_bundle
from trainer.representation.bundle import open_bundle
from trainer.representation.neighbours import exact_graph
from trainer.representation.preprocess import InputContract, fit_array

REPOSITORY = Path(export.__file__).parents[1]
CONTRACT = InputContract(size_px=16)
COUNT = 45  # more than one block of embeddings, and the last block is not full
FP32_ONLY = ExportConfig(variants=(), calibration_images=16)
CONFIG = EncoderConfig(backbone="small", image_size_px=16, head="mlp", dim=8, normalise=True)

_digits = np.rint(load_digits().images[:COUNT] * (255 / 16)).astype(np.uint8)
IMAGES = np.stack([fit_array(digit, CONTRACT) for digit in _digits])
LABELS = load_digits().target[:COUNT].astype(np.int64)
IDS = [f"digits/{i:03}.png" for i in range(COUNT)]


def prepared(positions: Sequence[int]) -> np.ndarray:
    return IMAGES[list(positions)]


def trained_encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(CONFIG).train()
    with torch.no_grad():  # statistics of the real images, as training leaves them
        encoder(torch.tensor(IMAGES).permute(0, 3, 1, 2) / 255)
    return encoder


def exported(directory: Path, encoder: Encoder | None = None, **changes: Any) -> Path:
    arguments = {
        "ids": IDS,
        "prepared": prepared,
        "contract": CONTRACT,
        "recipe": {"name": "digits", "encoder": CONFIG.model_dump()},
        "training": {"epochs": 3, "knn_accuracy": {"first": 0.625, "last": 0.9375}},
        "config": FP32_ONLY,
    }
    return export_bundle(encoder or trained_encoder(), directory, **{**arguments, **changes})


@pytest.fixture(scope="module")
def bundle_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # The tree may change between two exports of one test run; a commit is tested by itself.
        patch.setattr(export, "checkout_commit", lambda root: None)
        return exported(tmp_path_factory.mktemp("export") / "bundle")


def test_export__bundle_opens_and_states_the_run(bundle_directory: Path) -> None:
    bundle = open_bundle(bundle_directory)
    assert bundle.contract == CONTRACT
    assert (bundle.feature_dim, bundle.embedding_dim) == (256, 8)
    assert bundle.manifest["training"]["knn_accuracy"]["last"] == 0.9375
    assert bundle.manifest["recipe"]["name"] == "digits"
    assert bundle.manifest["parity"]["batch_sizes"] == [1, 2, 7]
    assert bundle.manifest["parity"]["outputs"]["embedding"]["7"]["max_abs"] <= 1e-4
    versions = bundle.manifest["provenance"]
    assert versions["torch"] == str(torch.__version__)
    assert versions["onnxruntime"] == onnxruntime.__version__
    preprocessor = json.loads(bundle.read("preprocessor_config.json"))
    assert preprocessor["image_mean"] == list(PIXEL_MEAN)


def test_export__gallery_is_every_image_through_the_final_encoder(bundle_directory: Path) -> None:
    gallery = open_bundle(bundle_directory).gallery()
    expected = embed_images(trained_encoder(), [IMAGES], "cpu")[1]
    assert gallery.ids == IDS
    np.testing.assert_allclose(gallery.embeddings, expected, atol=1e-5)
    graph = exact_graph(gallery.embeddings, 10)
    np.testing.assert_array_equal(gallery.graph.neighbours, graph.neighbours)
    np.testing.assert_array_equal(gallery.graph.similarities, graph.similarities)


def test_export__gallery_is_what_the_graph_answers_alone(bundle_directory: Path) -> None:
    """One image at a time, as a service may: batches may round differently, no more."""
    bundle = open_bundle(bundle_directory)
    session = onnxruntime.InferenceSession(bundle.encoder_onnx())
    alone = [session.run(["embedding"], {"images": IMAGES[i : i + 1]})[0] for i in range(COUNT)]
    np.testing.assert_allclose(np.concatenate(alone), bundle.gallery().embeddings, atol=1e-6)


def test_export__weights_load_into_a_fresh_encoder(bundle_directory: Path) -> None:
    weights = safetensors.torch.load(open_bundle(bundle_directory).read("encoder.safetensors"))
    fresh = build_encoder(CONFIG)
    fresh.load_state_dict(weights)  # strict: the names are the state's
    trained = trained_encoder().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in fresh.state_dict().items())


def test_export__twice_gives_the_same_model(
    bundle_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "checkout_commit", lambda root: None)
    again = exported(tmp_path / "elsewhere" / "again")
    assert open_bundle(again).model_id == open_bundle(bundle_directory).model_id
    manifest = (bundle_directory / "manifest.json").read_bytes()
    assert (again / "manifest.json").read_bytes() == manifest


def test_export__another_process_writes_the_same_graph(bundle_directory: Path) -> None:
    program = (
        "import hashlib, json, safetensors.torch, sys, trainer.encoder, trainer.onnx_graph as o\n"
        "from trainer.config import EncoderConfig\n"
        "encoder = trainer.encoder.build_encoder(EncoderConfig(**json.loads(sys.argv[2])))\n"
        "encoder.load_state_dict(safetensors.torch.load_file(sys.argv[1]))\n"
        "content = o.build_graph(o.published_copy(encoder)).content\n"
        "print(hashlib.sha256(content).hexdigest())\n"
    )
    weights = bundle_directory / "encoder.safetensors"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(weights), CONFIG.model_dump_json()],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    graph = (bundle_directory / "encoder.onnx").read_bytes()
    assert ran.stdout.strip() == hashlib.sha256(graph).hexdigest()


def test_export__encoder_keeps_mode_and_weights(bundle_directory: Path, tmp_path: Path) -> None:
    encoder = trained_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    exported(tmp_path / "bundle", encoder)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_export__never_asks_for_many_images_at_once(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def recorded(positions: Sequence[int]) -> np.ndarray:
        asked.append(list(positions))
        return prepared(positions)

    exported(tmp_path / "bundle", prepared=recorded)
    assert max(map(len, asked)) == export.EMBED_BATCH == 32
    # After parity's three calls, each image once.
    assert [position for block in asked[3:] for position in block] == list(range(COUNT))


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ExportConfig(variants=("fp16", "int8"), calibration_images=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "checkout_commit", lambda root: None)
        patch.setattr(variants, "SPEED_LEAST_S", 1e-4)
        folder = tmp_path_factory.mktemp("varied")
        exported(folder / "again", config=config, labels=LABELS)
        return exported(folder / "bundle", config=config, labels=LABELS)


def test_export__variants_are_graphs_that_answer_nearly_the_same(varied: Path) -> None:
    bundle = open_bundle(varied)
    assert bundle.precisions == ("fp32", "fp16", "int8")
    exact = bundle.gallery().embeddings
    for precision, least in (("fp16", 0.9999), ("int8", 0.99)):
        session = onnxruntime.InferenceSession(bundle.encoder_onnx(precision))
        features, embedding = session.run(["features", "embedding"], {"images": IMAGES})
        assert (features.shape, features.dtype) == ((COUNT, 256), np.float32)
        cosines = (embedding * exact).sum(axis=1)
        assert cosines.min() > least
        stated = bundle.variants[precision]
        assert stated["knn"]["fp32"] == bundle.variants["fp16"]["knn"]["fp32"]
        assert cosines.min() - 2e-4 <= stated["cosine"]["min"] <= 1
    sizes = {name: entry["size_bytes"] for name, entry in bundle.manifest["files"].items()}
    assert sizes["encoder.fp16.onnx"] < 0.55 * sizes["encoder.onnx"]
    assert sizes["encoder.int8.onnx"] < 0.55 * sizes["encoder.onnx"]
    assert f"{stated['cosine']['min']:.5f}" in bundle.read("README.md").decode()


def test_export__variants_twice_differ_in_the_speed_alone(varied: Path) -> None:
    one, other = open_bundle(varied), open_bundle(varied.parent / "again")
    assert one.model_id == other.model_id
    assert one.manifest["variants"] == other.manifest["variants"]
    differing = [n for n in one.manifest["files"] if one.read(n) != other.read(n)]
    assert differing == ["speed.json"]


def test_export__fp32_is_the_same_with_variants_and_without(
    varied: Path, bundle_directory: Path
) -> None:
    for name in ("encoder.onnx", "encoder.safetensors", "gallery/embeddings.npy"):
        assert open_bundle(varied).read(name) == open_bundle(bundle_directory).read(name)


def test_export__variant_below_its_floor_does_not_end_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = variants.int8_graph

    def dark(content: bytes, batches: Iterable[np.ndarray]) -> bytes:
        """Calibrated with black images: what a real one causes is cut off."""
        return quantise(content, [0 * images for images in batches])

    monkeypatch.setattr(variants, "int8_graph", dark)
    said: list[str] = []
    config = ExportConfig(variants=("fp16", "int8"), calibration_images=16)
    encoder = trained_encoder()
    with torch.no_grad():
        for _ in range(20):  # until its statistics are those of the images: they differ then
            encoder(torch.tensor(IMAGES).permute(0, 3, 1, 2) / 255)
    bundle = open_bundle(exported(tmp_path / "bundle", encoder, config=config, say=said.append))
    assert bundle.precisions == ("fp32", "fp16")
    reason = bundle.variants["int8"]["reason"]
    assert "smallest cosine to fp32 is" in reason
    assert not (tmp_path / "bundle" / "encoder.int8.onnx").exists()
    assert said[-1] == f"WARNING: no int8 graph in the bundle: {reason}"
    assert f"no int8: {reason}" in bundle.read("README.md").decode()


def test_export__one_image(tmp_path: Path) -> None:
    gallery = open_bundle(exported(tmp_path / "bundle", ids=["only"])).gallery()
    assert gallery.ids == ["only"]
    assert (gallery.graph.neighbours == -1).all()


def _nan_weight(encoder: Encoder) -> None:
    encoder.state_dict()["head.0.weight"][0, 0] = float("nan")


def _overflow(encoder: Encoder) -> None:
    encoder.state_dict()["backbone.0.weight"].fill_(3e38)


def _dead_head(encoder: Encoder) -> None:
    for name in ("head.2.weight", "head.2.bias", "head.3.running_mean"):
        encoder.state_dict()[name].zero_()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_nan_weight, r"head\.0\.weight holds 1 of 65536 values that are not finite"),
        (_overflow, r"features at batch 1: the network answers values that are not finite"),
        (_dead_head, r"image 'digits/000\.png' has length 0, wanted 1"),
    ],
)
def test_export__broken_encoder_is_not_published(
    tmp_path: Path, damage: Callable[[Encoder], None], said: str
) -> None:
    encoder = trained_encoder()
    damage(encoder)
    with pytest.raises(ExportError, match=said):
        exported(tmp_path / "bundle", encoder)
    assert list(tmp_path.iterdir()) == []


def test_export__parity_miss_keeps_the_older_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = open_bundle(exported(tmp_path / "bundle")).model_id
    answer = onnx_graph.OnnxGraph.run

    def off_at_batch_7(graph: onnx_graph.OnnxGraph, images: np.ndarray) -> dict[str, np.ndarray]:
        answered = answer(graph, images)
        if len(images) == 7:
            answered["embedding"] = answered["embedding"] + np.float32(0.002)
        return answered

    monkeypatch.setattr(onnx_graph.OnnxGraph, "run", off_at_batch_7)
    with pytest.raises(ExportError, match=r"embedding at batch 7: .*differ by 0\.002 .*cosine 0\."):
        exported(tmp_path / "bundle", training={"epochs": 4})
    assert open_bundle(tmp_path / "bundle").model_id == older
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contract": InputContract(size_px=32)}, "encoder takes 16 px, the contract gives 32 px"),
        ({"ids": []}, "no images"),
        ({"prepared": lambda at: prepared(at)[:, :8]}, r"wanted images uint8 \(1, 16, 16, 3\)"),
        ({"prepared": lambda at: prepared(at).astype(np.float32)}, "got float32"),
        ({"prepared": lambda at: IMAGES[:1]}, r"\(2, 16, 16, 3\), got uint8 \(1, 16, 16, 3\)"),
    ],
)
def test_export__parts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        exported(tmp_path / "bundle", **changes)
    assert list(tmp_path.iterdir()) == []


def _git(directory: Path, *arguments: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    ran = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments],
        cwd=directory,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


def test_checkout_commit__clean_changed_and_inside(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    (tmp_path / "package").mkdir()
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "one")
    _git(tmp_path, "tag", "v1")  # a tag does not stand in for the commit
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert checkout_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert checkout_commit(tmp_path) == f"{commit}-dirty"
    assert checkout_commit(tmp_path / "package") is None  # an environment in somebody's checkout


def test_checkout_commit__no_checkout_or_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout_commit(REPOSITORY) is None
