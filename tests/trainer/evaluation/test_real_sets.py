"""From real images to a report: train briefly, then evaluate on three sets by the command.

Run: pytest tests/trainer/evaluation/test_real_sets.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.cifar10_pack import balanced, read_pack
from trainer.run import main as train

DATA = Path(__file__).parents[4] / "shared" / "data"
Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]
PER_CLASS = {"train": 40, "test": 20}


def _file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def _drawn(labels: np.ndarray, split: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    parts = [
        draw.permutation(np.flatnonzero(labels == label))[: PER_CLASS[split]]
        for label in np.unique(labels)
    ]
    return np.concatenate(parts)


def _cifar(root: Path) -> None:
    path = _file("cifar10_jpeg444_q95.npz")
    for split, count in PER_CLASS.items():
        few = balanced(read_pack(split, path), count, seed=0)  # type: ignore[arg-type]
        np.savez(root / f"{split}.npz", images=few.images, labels=few.labels)


def _fashion(root: Path) -> None:
    with np.load(_file("fashion_mnist.npz"), allow_pickle=False) as arrays:
        for split in PER_CLASS:
            rows = _drawn(arrays[f"y_{split}"], split)
            images, labels = arrays[f"x_{split}"][rows], arrays[f"y_{split}"][rows]
            np.savez(root / f"{split}.npz", images=images, labels=labels)


def _wafers(root: Path) -> None:
    with np.load(_file("wm811k_42951.npz"), allow_pickle=False) as arrays:
        for split in PER_CLASS:
            shapes, labels = arrays[f"shape_{split}"].astype(np.int64), arrays[f"labels_{split}"]
            ends, maps = shapes.prod(axis=1).cumsum(), arrays[f"maps_{split}"]
            rows = _drawn(labels, split)
            pixels = [maps[ends[i] - shapes[i].prod() : ends[i]] for i in rows]
            np.savez(
                root / f"{split}.npz",
                pixels=np.concatenate(pixels),
                shapes=shapes[rows],
                labels=labels[rows],
            )


SETS = {"cifar10": (_cifar, 10), "fashion": (_fashion, 10), "wm811k": (_wafers, 9)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small encoder after a few epochs on 400 clothes."""
    root = tmp_path_factory.mktemp("clothes")
    _fashion(root)
    words = [
        "digits",
        "--data",
        str(root / "train.npz"),
        "--output",
        str(root / "run"),
        "encoder.image_size_px=32",
        "epochs=4",
        "device=cpu",
        "data.workers=0",
        "loss.warmup_epochs=2",
        "loss.num_background=128",
        "monitor.every_epochs=4",
        "export.variants=[]",
    ]
    assert train(words) == 0
    return root / "run" / "bundle"


# A set takes over a minute: one in every run, all with --long.
@pytest.mark.parametrize(
    "name", ["fashion", *(pytest.param(n, marks=pytest.mark.long) for n in ("cifar10", "wm811k"))]
)
def test_real_set__by_all_three_probes(
    name: str, trained: Path, run_job: Run, tmp_path: Path
) -> None:
    write, classes = SETS[name]
    root = tmp_path / name
    root.mkdir()
    write(root)
    shared = {
        "bundle": str(trained),
        "dataset": {"name": name, "kind": "npz", "root": str(root)},
        "cache": str(tmp_path / "cache"),
    }
    chance = 1 / classes
    reports = {}
    for which, values in {
        "knn": {"protocol": "knn", "settings": {"k": [20, 1]}},
        "lbfgs": {"protocol": "linear_probe", "settings": {"classifier": "lbfgs"}},
        "sgd": {"protocol": "linear_probe", "settings": {"epochs": 20, "lr": 0.1}},
    }.items():
        code, lines, output = run_job(which, **shared, **values)
        assert code == 0, lines[-1]
        assert (output / "report.html").stat().st_size > 10_000
        reports[which] = json.loads((output / "report.json").read_text())
    for report in reports.values():
        assert len(report["dataset"]["class_names"]) == classes
        assert report["headline"]["interval"][0] > chance, report["headline"]
        assert report["headline"]["untrained"] is not None
    # One cache for all of them: both probes read the rows that kNN had computed.
    assert "frozen features of train" not in reports["sgd"]["durations_s"]
    assert reports["knn"]["dataset"]["fingerprint"] == reports["sgd"]["dataset"]["fingerprint"]
