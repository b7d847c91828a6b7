"""Arrays of images that differ in size, such as wafer maps.

Run: pytest tests/trainer/test_datasets_arrays.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.datasets import DataError, open_source, reduced_picture
from trainer.representation.preprocess import InputContract, fit_array
from trainer.run import main

WAFERS, CLOTHES = (
    Path(__file__).parents[3] / "shared" / "data" / name
    for name in ("wm811k_42951.npz", "fashion_mnist.npz")
)


def _write(path: Path, **changes: np.ndarray) -> Path:
    arrays = {
        "pixels": np.arange(6 + 4 + 20, dtype=np.uint8),
        "shapes": np.array([[2, 3], [4, 1], [4, 5]]),
        "labels": np.array(["ring", "edge", "ring"]),
    }
    np.savez(path, **{**arrays, **changes})
    return path


def test_ragged__gives_each_image_its_shape(tmp_path: Path) -> None:
    source = open_source(str(_write(tmp_path / "x.npz")))
    assert source.ids == ("0", "1", "2")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]
    second, third = (reduced_picture(source.pictures[i], 8) for i in (1, 2))
    assert second.shape == (2, 1, 3)  # twice as high as wide at most: its middle
    assert second[:, 0, 0].tolist() == [7, 8]
    assert (third[:, :, 0] == np.arange(10, 30).reshape(4, 5)).all()
    contract = InputContract(size_px=8)
    wanted = fit_array(np.arange(10, 30, dtype=np.uint8).reshape(4, 5), contract)
    assert (source.prepared([2], contract)[0] == wanted).all()


def test_ragged__of_colours(tmp_path: Path) -> None:
    pixels = np.arange(2 * 1 * 3 + 1 * 2 * 1, dtype=np.uint8)
    path = _write(
        tmp_path / "x.npz", pixels=pixels, shapes=np.array([[2, 1, 3], [1, 2, 1]]), labels=[0, 1]
    )
    source = open_source(str(path))
    assert reduced_picture(source.pictures[0], 8).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert reduced_picture(source.pictures[1], 8).tolist() == [[[6] * 3, [7] * 3]]


def test_ragged__fingerprint_follows_pixels_and_shapes(tmp_path: Path) -> None:
    pixels = np.arange(30, dtype=np.uint8)
    pixels[29] = 0
    prints = {
        open_source(str(_write(tmp_path / "x.npz", **changes))).fingerprint
        for changes in (
            {},
            {"pixels": pixels},
            {"shapes": np.array([[3, 2], [4, 1], [4, 5]])},
        )
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pixels": np.zeros(30)}, r"`pixels` is float64 \(30,\), wanted uint8"),
        ({"pixels": np.zeros((3, 10), np.uint8)}, r"`pixels` is uint8 \(3, 10\)"),
        ({"pixels": np.zeros(29, np.uint8)}, "ask for 30 values, `pixels` holds 29"),
        ({"shapes": np.ones((3, 2))}, r"`shapes` is float64 \(3, 2\)"),
        ({"shapes": np.ones((3, 4), int)}, r"wanted integers \(N, 2\)"),
        ({"shapes": np.array([[2, 3], [4, 0], [4, 5]])}, r"row 1 is \[4 0\]"),
        ({"shapes": np.array([[2, 3, 1], [4, 1, 2], [4, 5, 3]])}, r"row 1 is \[4 1 2\]"),
        ({"shapes": np.zeros((0, 2), int), "labels": np.zeros(0)}, "it is empty"),
        ({"labels": np.zeros(2)}, r"`labels` is \(2,\) for 3 images"),
        ({"images": np.zeros((1, 2, 2), np.uint8)}, "has both forms"),
    ],
)
def test_ragged__of_another_form(tmp_path: Path, changes: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_source(str(_write(tmp_path / "x.npz", **changes)))


def _follow_the_readme(array: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the block of trainer/README.md that names `array` where the originals lie."""
    readme = (Path(__file__).parents[2] / "trainer" / "README.md").read_text()
    lines = next(part for part in readme.split("```")[1::2] if array in part)
    monkeypatch.chdir(place)
    Path("wm811k.npz").symlink_to(WAFERS)
    Path("fashion_mnist.npz").symlink_to(CLOTHES)
    exec(lines.removeprefix("python\n"), {})


def _train(recipe: str, data: Path, *words: str) -> dict[str, Any]:
    """The report of a run of one epoch with a small encoder."""
    small = ["encoder.backbone=small", "epochs=1", "loss.warmup_epochs=0", "device=cpu"]
    line = [recipe, "--data", str(data), "--output", "run", *small, "data.workers=0", *words]
    assert main(line) == 0
    report: dict[str, Any] = json.loads(Path("run/report.json").read_text())
    return report


@pytest.mark.skipif(not WAFERS.is_file(), reason=f"the wafer maps are not at {WAFERS}")
def test_wafer_maps__by_the_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _follow_the_readme("maps_train", tmp_path, monkeypatch)
    source = open_source("wafers.npz")
    assert len(source) == 18_051
    assert source.labels is not None
    assert source.labels.max() == 8
    with np.load(WAFERS) as stored:
        height, width = (int(side) for side in stored["shape_train"][0])
        first = stored["maps_train"][: height * width].reshape(height, width)
    assert (np.asarray(source.pictures[0]) == first).all()
    some = [np.asarray(picture) for picture in source.pictures[::90]]
    assert len({picture.shape for picture in some}) > 20
    np.savez(
        "some.npz",
        pixels=np.concatenate([picture.ravel() for picture in some]),
        shapes=np.array([picture.shape for picture in some]),
        labels=source.labels[::90],
    )
    report = _train("wm811k", Path("some.npz"), "batch_size=32", "encoder.image_size_px=24")
    assert (report["data"]["images_found"], report["data"]["images_skipped"]) == (201, 0)
    assert 0.3 < report["training"]["knn_trained"] <= 1  # six in ten are of one class


@pytest.mark.skipif(not CLOTHES.is_file(), reason=f"Fashion-MNIST is not at {CLOTHES}")
def test_clothes__by_the_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _follow_the_readme("x_train", tmp_path, monkeypatch)
    source = open_source("fashion.npz")
    assert len(source) == 60_000
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [6000] * 10
    pixels = np.stack([np.asarray(picture) for picture in source.pictures[::150]])
    np.savez("some.npz", images=pixels, labels=source.labels[::150])
    report = _train("digits", Path("some.npz"), "batch_size=50", "encoder.image_size_px=28")
    assert report["data"]["images_trained_on"] + report["data"]["images_held_out"] == 400
    assert report["training"]["knn_trained"] > 0.4  # a tenth by chance; untrained networks have 0.6
