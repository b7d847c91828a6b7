"""A small bundle, small labelled sets, and an evaluation of them, for the tests of protocols."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import load_recipe
from trainer.decode_pool import DecodePool
from trainer.encoder import build_encoder
from trainer.evaluate import main
from trainer.evaluation.context import Evaluation, open_network
from trainer.evaluation.datasets import open_dataset
from trainer.evaluation.job import parse_job
from trainer.export import export_bundle
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import InputContract

SIDE = 16


def write_small_bundle(directory: Path, *changes: str, side: int = SIDE) -> Path:
    """Export an encoder with drawn weights, which tell colours apart already."""
    recipe = load_recipe(
        "digits",
        [
            f"encoder.image_size_px={side}",
            "encoder.dim=8",
            "export.variants=[]",
            *changes,
        ],
    )
    torch.manual_seed(1)
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3)).astype(np.uint8)
    return export_bundle(
        build_encoder(recipe.encoder).eval(),
        directory,
        ids=[str(i) for i in range(len(images))],
        prepared=lambda rows: images[list(rows)],
        contract=InputContract(size_px=side),
        recipe=recipe.as_dict(),
        training={},
        config=recipe.export,
    )


@pytest.fixture(scope="session")
def bundle_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def draw_images(count: int, classes: int = 3, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, SIDE, SIDE, 3) noise around one grey for each class, and their labels."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = draw.integers(0, 90, (count, SIDE, SIDE, 3)) + (labels * 60)[:, None, None, None]
    return pixels.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz of 60 and test.npz of 30 images in three classes."""
    root = tmp_path_factory.mktemp("packed")
    for name, count, seed in (("train", 60, 0), ("test", 30, 1)):
        images, labels = draw_images(count, seed=seed)
        np.savez(root / f"{name}.npz", images=images, labels=labels)
    return root


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of PNGs for each class below a split's folder."""

    def write(split: str = "", classes: tuple[str, ...] = ("a", "b"), count: int = 5) -> Path:
        root = tmp_path / "folder"
        for seat, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = Image.new("RGB", (20, 18), (40 * seat, i, 90))
                image.save(root / split / name / f"{i}.png")
        return root

    return write


@pytest.fixture
def make_evaluation(
    bundle_directory: Path, packed_folder: Path, tmp_path: Path
) -> Callable[..., Evaluation]:
    """An evaluation of the small bundle on the packed set, or on another one."""

    def make(bundle: Path | None = None, seed: int = 0, **dataset: Any) -> Evaluation:
        values = {"name": "set", "kind": "npz", "root": str(packed_folder), **dataset}
        job = parse_job(
            {"protocol": "knn", "bundle": str(bundle_directory), "dataset": values, "seed": seed}
        )
        opened, device = open_bundle(bundle or bundle_directory), torch.device("cpu")
        return Evaluation(
            bundle=opened,
            trained=open_network(opened, device),
            dataset=open_dataset(job.dataset, seed=seed),
            seed=seed,
            device=device,
            pool=DecodePool(0),
            cache=tmp_path / "features",
        )

    return make


@pytest.fixture
def run_job(
    bundle_directory: Path,
    packed_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, list[dict[str, Any]], Path]]:
    """Run `python -m trainer.evaluate` in this process: exit code, lines, the output folder."""

    def run(output: str = "out", **values: Any) -> tuple[int, list[dict[str, Any]], Path]:
        dataset = {"name": "set", "kind": "npz", "root": str(packed_folder)}
        job = {"protocol": "knn", "bundle": str(bundle_directory), "dataset": dataset, "workers": 0}
        path = tmp_path / "asked.json"
        path.write_text(json.dumps({**job, **values}))
        code = main(["--job", str(path), "--output", str(tmp_path / output)])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return code, lines, tmp_path / output

    return run


@pytest.fixture
def voc_tree(tmp_path: Path) -> Path:
    """24 training and 12 test images: dark, light, or dark with a difficult light object."""
    root, draw = tmp_path / "VOC2007", np.random.default_rng(0)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for split, listed, count in (("train", "trainval", 24), ("test", "test", 12)):
        keys = [f"{split}{i:02d}" for i in range(count)]
        (root / "ImageSets" / "Main" / f"{listed}.txt").write_text("\n".join(keys) + "\n")
        for i, key in enumerate(keys):
            grey = 160 if i % 3 == 1 else 20
            pixels = draw.integers(grey, grey + 60, (18, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{key}.jpg")
            objects = [("light", 0)] if i % 3 == 1 else [("dark", 0)]
            if i % 3 == 2:
                objects.append(("light", 1))
            (root / "Annotations" / f"{key}.xml").write_text(_annotation(objects))
    return root


def _annotation(objects: list[tuple[str, int]]) -> str:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>8</ymax></bndbox>"
    listed = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>"
        for name, difficult in objects
    )
    return f"<annotation>{listed}</annotation>"
