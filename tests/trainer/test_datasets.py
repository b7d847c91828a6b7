"""Sources: ids, labels, fingerprints, and what is refused.

Run: pytest tests/trainer/test_datasets.py
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.datasets import (
    DataError,
    open_source,
    reduced_picture,
    split,
)
from trainer.representation.preprocess import ImageRejected, InputContract, fit_array, prepare


def _save(path: Path, size: tuple[int, int] = (12, 10), value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def test_folder__nested_gives_sorted_paths_and_top_folders_as_labels(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/deep/er/1.jpg", "b/10.png", "a/0.bmp", "c/x.TIFF"):
        _save(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.ids == ("a/0.bmp", "a/deep/er/1.jpg", "b/10.png", "b/2.png", "c/x.TIFF")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1, 2]


def test_folder__flat_or_half_nested_or_of_one_class_has_no_labels(tmp_path: Path) -> None:
    _save(tmp_path / "only" / "1.png")
    assert open_source(str(tmp_path)).labels is None
    _save(tmp_path / "other" / "1.png")
    assert open_source(str(tmp_path)).labels is not None
    _save(tmp_path / "1.png")
    assert open_source(str(tmp_path)).labels is None


def test_folder__passes_over_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".hidden/c.png"):
        _save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert source.ids == ("a.png",)
    assert source.other_files == 1


def test_folder__names_that_cannot_be_ids_are_skipped_with_the_reason(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    _save(deep / ("f" * 150 + ".png"))
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    _save(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    assert source.ids == ("b.png",)
    assert [file.reason for file in source.skipped] == [
        "its name is not UTF-8: rename it",
        "its path has 556 characters, at most 512 can be an id",
    ]


def test_folder__fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    first = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == first
    (tmp_path / "notes.txt").write_text("no image")
    assert open_source(str(tmp_path)).fingerprint == first
    _save(tmp_path / "a.png", (500, 400))
    assert open_source(str(tmp_path)).fingerprint != first
    _save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert open_source(str(tmp_path)).fingerprint != first


@pytest.mark.parametrize("content", [[], ["notes.txt"]])
def test_folder__without_an_image(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match=rf"holds no image, {len(content)} other files.*\.jpg"):
        open_source(str(tmp_path))


def test_source__that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing does not exist: give a folder"):
        open_source(str(tmp_path / "nothing"))
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.zip is a file of no known kind: give .*an \.npz"):
        open_source(str(tmp_path / "a.zip"))


def test_packed__ids_labels_and_colours(tmp_path: Path) -> None:
    images = np.arange(11 * 2 * 2, dtype=np.uint8).reshape(11, 2, 2)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array(list("bbabbbbbbbb")))
    source = open_source(str(tmp_path / "x.npz"))
    assert source.ids[:2] == ("00", "01")
    assert source.ids[-1] == "10"
    assert source.labels is not None
    assert source.labels.tolist() == [1, 1, 0] + [1] * 8
    pixels = reduced_picture(source.pictures[3], 8)
    assert (pixels == images[3][:, :, None]).all()
    assert pixels.shape == (2, 2, 3)


def test_packed__fingerprint_follows_every_byte(tmp_path: Path) -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    path = tmp_path / "x.npz"
    np.savez(path, images=images)
    first = open_source(str(path)).fingerprint
    images[3, 1, 1, 2] = 1
    np.savez(path, images=images)
    assert open_source(str(path)).fingerprint != first


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x_train": np.zeros((4, 2, 2), np.uint8)}, r"no array 'images', only \['x_train'\]"),
        ({"images": np.zeros((4, 2, 2), np.float32)}, r"float32 \(4, 2, 2\), wanted uint8"),
        ({"images": np.zeros((4, 2), np.uint8)}, r"uint8 \(4, 2\), wanted uint8 \(N, H, W\)"),
        ({"images": np.zeros((4, 2, 2, 4), np.uint8)}, "4 channels, wanted 1"),
        ({"images": np.zeros((0, 2, 2), np.uint8)}, "no side of 0"),
        (
            {"images": np.zeros((4, 2, 2), np.uint8), "labels": np.zeros(3, int)},
            r"`labels` is \(3,\) for 4 images",
        ),
    ],
)
def test_packed__of_another_form(tmp_path: Path, arrays: dict[str, np.ndarray], told: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=told):
        open_source(str(tmp_path / "x.npz"))


class _Canary:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_packed__damaged_or_pickled(tmp_path: Path) -> None:
    path, canary = tmp_path / "x.npz", tmp_path / "executed"
    np.savez(path, images=np.random.default_rng(0).integers(0, 9, (4, 9, 9), dtype=np.uint8))
    whole = path.read_bytes()
    for content in (b"", b"no zip", whole[:200], pickle.dumps(_Canary(canary))):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz cannot be read"):
            open_source(str(path))
    objects = np.empty(1, object)
    objects[0] = _Canary(canary)
    np.savez(path, images=objects)
    with pytest.raises(DataError, match=r"cannot be read as an \.npz of plain arrays"):
        open_source(str(path))
    assert not canary.exists()
    flipped = bytearray(whole)
    flipped[whole.index(b"NUMPY") + 150] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="CRC"):
        open_source(str(path))


def test_digits__are_the_whole_set_on_the_byte_scale() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.ids[0] == "0000"
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    values = np.unique(np.stack(list(source.pictures)))  # type: ignore[arg-type]
    assert len(values) == 17
    assert values[[0, 1, 8, 16]].tolist() == [0, 16, 128, 255]


def test_prepared__is_what_the_service_computes(tmp_path: Path) -> None:
    contract = InputContract(size_px=8, crop_fraction=0.875)
    noise = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    _save(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    wanted = [prepare(tmp_path / name, contract) for name in ("b.png", "a.jpg")]
    assert (source.prepared([1, 0], contract) == np.stack(wanted)).all()
    np.savez(tmp_path / "x.npz", images=noise[None])
    arrays = open_source(str(tmp_path / "x.npz"))
    assert (arrays.prepared([0], contract)[0] == fit_array(noise, contract)).all()


def test_prepared__of_a_file_that_went_away_since(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png could be read when the run began"):
        source.prepared([0], InputContract(size_px=8))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((64, 32), (32, 16)),  # shrunk to a short side of 14 * 256 / 224 = 16
        ((10, 12), (10, 12)),  # never enlarged
        ((400, 32), (32, 16)),  # the middle of a panorama
        ((10, 40), (10, 20)),  # of a narrow one too
    ],
)
def test_reduced__sizes(tmp_path: Path, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    _save(tmp_path / "a.png", size)
    assert reduced_picture(tmp_path / "a.png", 14).shape == (wanted[1], wanted[0], 3)


def test_reduced__keeps_the_middle(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 20), (255, 0, 0))
    image.paste((0, 255, 0), (180, 0, 220, 20))
    image.save(tmp_path / "a.png")
    # At the very edge the filter reaches beyond what is kept, by half a source pixel.
    assert (reduced_picture(tmp_path / "a.png", 14)[:, 1:-1] == (0, 255, 0)).all()


def test_reduced__beyond_the_pixel_limit(tmp_path: Path, huge_png: bytes) -> None:
    (tmp_path / "a.png").write_bytes(huge_png)
    with pytest.raises(ImageRejected, match=r"400000000 pixels.*at most 50,000,000"):
        reduced_picture(tmp_path / "a.png", 14)


def test_split__keeps_the_share_in_each_class_and_follows_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 8]).astype(np.int64)
    train, held = split(labels, 68, holdout=0.25, seed=0)
    assert np.bincount(labels[held]).tolist() == [10, 5, 2]
    assert sorted([*train, *held]) == list(range(68))
    again, other = (split(labels, 68, holdout=0.25, seed=seed)[1] for seed in (0, 1))
    assert (held == again).all()
    assert (held != other).any()


def test_split__without_labels_or_share_holds_nothing_out() -> None:
    labels = np.array([0, 1, 0, 1])
    assert split(None, 4, holdout=0.5, seed=0)[1].tolist() == []
    assert split(labels, 4, holdout=0, seed=0)[0].tolist() == [0, 1, 2, 3]


def test_class_names__are_what_the_source_calls_its_classes(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.jpg"):
        _save(tmp_path / "named" / name)
    assert open_source(str(tmp_path / "named")).class_names == ("a", "b")
    _save(tmp_path / "flat" / "1.png")
    assert open_source(str(tmp_path / "flat")).class_names is None
    lines = tmp_path / "list.txt"
    lines.write_text("b/2.png 10\na/1.jpg 9\n")
    listed = open_source(f"{lines}:{tmp_path / 'named'}")
    assert listed.class_names == ("9", "10")  # by number, not by the alphabet
    assert listed.labels is not None
    assert listed.labels.tolist() == [1, 0]
