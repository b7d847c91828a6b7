"""From real images to a report: train briefly, then evaluate on three sets by the command.

Run: pytest tests/trainer/evaluation/test_real_sets.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.real_sets import DATA, FILES, WRITE
from trainer.run import main as train

Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]
PER_CLASS = {"train": 40, "test": 20}
CLASSES = {"cifar10": 10, "fashion": 10, "wm811k": 9}


def _write(name: str, root: Path) -> None:
    if not (DATA / FILES[name]).is_file():
        pytest.skip(f"{DATA / FILES[name]} is not there")
    WRITE[name](root, PER_CLASS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small encoder after a few epochs on 400 clothes."""
    root = tmp_path_factory.mktemp("clothes")
    _write("fashion", root)
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
    root = tmp_path / name
    root.mkdir()
    _write(name, root)
    shared = {
        "bundle": str(trained),
        "dataset": {"name": name, "kind": "npz", "root": str(root)},
        "cache": str(tmp_path / "cache"),
    }
    chance = 1 / CLASSES[name]
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
        assert len(report["dataset"]["class_names"]) == CLASSES[name]
        assert report["headline"]["interval"][0] > chance, report["headline"]
        assert report["headline"]["untrained"] is not None
    # One cache for all of them: both probes read the rows that kNN had computed.
    assert "frozen features of train" not in reports["sgd"]["durations_s"]
    assert reports["knn"]["dataset"]["fingerprint"] == reports["sgd"]["dataset"]["fingerprint"]
