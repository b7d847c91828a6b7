"""torchvision's sets: small copies of their layouts, opened by torchvision's own classes.

Run: pytest tests/trainer/test_datasets_torchvision_sets.py
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from trainer.datasets import DataError, open_source
from trainer.datasets.torchvision_sets import TORCHVISION_SETS


def _save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)


def _text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _mat(path: Path, **arrays: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


def _aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    _save(data / "images" / "2.jpg", data / "images" / "1.jpg", data / "images" / "3.jpg")
    _text(data / "variants.txt", "707-320", "A 340")
    _text(data / "images_variant_trainval.txt", "2 707-320", "1 A 340")


def _caltech101(root: Path) -> None:
    (root / "caltech101" / "Annotations").mkdir(parents=True)
    for name in ("BACKGROUND_Google", "ant", "bee"):
        _save(root / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg")


def _cars(root: Path) -> None:
    base = root / "stanford_cars"
    _save(base / "cars_train" / "00002.jpg", base / "cars_train" / "00001.jpg")
    rows = np.array([("00002.jpg", 1), ("00001.jpg", 2)], [("fname", object), ("class", object)])
    _mat(base / "devkit" / "cars_train_annos.mat", annotations=rows)
    _mat(base / "devkit" / "cars_meta.mat", class_names=np.array(["a", "b"], object))


def _dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    _save(base / "images" / "dotted" / "2.jpg", base / "images" / "banded" / "1.jpg")
    _text(base / "labels" / "train1.txt", "dotted/2.jpg", "banded/1.jpg")


def _eurosat(root: Path) -> None:
    _save(root / "eurosat" / "2750" / "Forest" / "1.jpg", root / "eurosat/2750/River/2.jpg")


def _flowers102(root: Path) -> None:
    base = root / "flowers-102"
    _save(base / "jpg" / "image_00001.jpg", base / "jpg" / "image_00002.jpg")
    _mat(base / "imagelabels.mat", labels=np.array([7, 3]))
    _mat(base / "setid.mat", trnid=np.array([2, 1]), valid=np.array([3]), tstid=np.array([4]))


def _food101(root: Path) -> None:
    base = root / "food-101"
    _save(base / "images" / "pie" / "1.jpg", base / "images" / "cake" / "2.jpg")
    _text(base / "meta" / "train.json", json.dumps({"pie": ["pie/1"], "cake": ["cake/2"]}))


def _imagenet(root: Path) -> None:
    _save(root / "train" / "n01" / "a.JPEG", root / "train" / "n02" / "b.JPEG")
    _save(root / "val" / "n01" / "c.JPEG")


def _pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    _save(base / "images" / "Pug_2.jpg", base / "images" / "Abys_1.jpg")
    _text(base / "annotations" / "trainval.txt", "Pug_2 2 2 1", "Abys_1 1 1 1")


def _places365(root: Path) -> None:
    _save(root / "data_256_standard" / "b" / "2.jpg", root / "data_256_standard" / "a" / "1.jpg")
    _text(root / "categories_places365.txt", "/a 0", "/b 1")
    _text(root / "places365_train_standard.txt", "/b/2.jpg 1", "/a/1.jpg 0")


def _sun397(root: Path) -> None:
    _save(
        root / "SUN397" / "b" / "bar" / "sun_2.jpg", root / "SUN397" / "a" / "abbey" / "sun_1.jpg"
    )
    _text(root / "SUN397" / "ClassName.txt", "/a/abbey", "/b/bar")


# Writer, ids in order and their labels.
FILE_SETS: dict[str, tuple[Callable[[Path], None], list[str], list[int]]] = {
    "aircraft": (_aircraft, [f"fgvc-aircraft-2013b/data/images/{i}.jpg" for i in (1, 2)], [1, 0]),
    "caltech101": (
        _caltech101,
        [f"caltech101/101_ObjectCategories/{name}/image_0001.jpg" for name in ("ant", "bee")],
        [0, 1],
    ),
    "cars": (_cars, [f"stanford_cars/cars_train/0000{i}.jpg" for i in (1, 2)], [1, 0]),
    "dtd": (_dtd, ["dtd/dtd/images/banded/1.jpg", "dtd/dtd/images/dotted/2.jpg"], [0, 1]),
    "eurosat": (_eurosat, ["Forest/1.jpg", "River/2.jpg"], [0, 1]),
    "flowers102": (_flowers102, [f"flowers-102/jpg/image_0000{i}.jpg" for i in (1, 2)], [1, 0]),
    "food101": (_food101, ["food-101/images/cake/2.jpg", "food-101/images/pie/1.jpg"], [0, 1]),
    "imagenet": (_imagenet, ["n01/a.JPEG", "n02/b.JPEG"], [0, 1]),
    "pets": (_pets, [f"oxford-iiit-pet/images/{name}.jpg" for name in ("Abys_1", "Pug_2")], [0, 1]),
    "places365": (_places365, ["data_256_standard/a/1.jpg", "data_256_standard/b/2.jpg"], [0, 1]),
    "sun397": (_sun397, ["SUN397/a/abbey/sun_1.jpg", "SUN397/b/bar/sun_2.jpg"], [0, 1]),
}


@pytest.fixture
def unhashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torchvision take small copies for the originals, whose MD5 it knows."""
    there = Path.is_file
    for module in ("cifar", "svhn", "flowers102", "places365"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity",
            lambda path, md5=None: there(Path(path)),
        )


@pytest.mark.parametrize("name", sorted(FILE_SETS))
@pytest.mark.usefixtures("unhashed")
def test_file_set__gives_paths_in_sorted_order_with_labels(tmp_path: Path, name: str) -> None:
    write, ids, labels = FILE_SETS[name]
    write(tmp_path)
    source = open_source(f"{name}:{tmp_path}")
    assert list(source.ids) == ids
    assert source.labels is not None
    assert source.labels.tolist() == labels
    for picture in source.pictures:
        assert isinstance(picture, Path)
        assert picture.is_file()


@pytest.mark.usefixtures("unhashed")
@pytest.mark.parametrize(
    ("name", "folder", "batches", "key"),
    [
        ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels"),
        ("cifar100", "cifar-100-python", ["train"], "fine_labels"),
    ],
)
def test_cifar__is_an_array_of_the_training_split(
    tmp_path: Path, name: str, folder: str, batches: list[str], key: str
) -> None:
    root = tmp_path / folder
    root.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(10) % 3
    for file, rows in zip(batches, np.array_split(np.arange(10), len(batches)), strict=True):
        planes = images[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
        entry = {"data": planes, key: labels[rows].tolist()}
        (root / file).write_bytes(pickle.dumps(entry))
    (root / ("test" if name == "cifar100" else "test_batch")).write_bytes(b"not read")
    meta = {"fine_label_names": ["a"], "label_names": ["a"]}
    (root / ("meta" if name == "cifar100" else "batches.meta")).write_bytes(pickle.dumps(meta))
    source = open_source(f"{name}:{tmp_path}")
    assert source.ids == tuple("0123456789")
    assert (np.stack(list(source.pictures)) == images).all()  # type: ignore[arg-type]
    assert source.labels is not None
    assert source.labels.tolist() == labels.tolist()


@pytest.mark.usefixtures("unhashed")
def test_svhn__is_an_array_with_ten_as_nought(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    _mat(tmp_path / "train_32x32.mat", X=images.transpose(1, 2, 3, 0), y=np.array([[10], [1], [2]]))
    source = open_source(f"svhn:{tmp_path}")
    assert (np.stack(list(source.pictures)) == images).all()  # type: ignore[arg-type]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(TORCHVISION_SETS))
def test_set__that_is_not_there_says_what_torchvision_wants(tmp_path: Path, name: str) -> None:
    known = TORCHVISION_SETS[name]
    with pytest.raises(DataError, match=rf"lacks {known.wanted[0]}.* Nothing is downloaded here"):
        open_source(f"{name}:{tmp_path}")
    assert not list(tmp_path.iterdir())


def test_set__of_other_content_than_torchvision_knows(tmp_path: Path) -> None:
    (tmp_path / "train_32x32.mat").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"not what torchvision\.datasets\.SVHN expects .*corrupted"
    ):
        open_source(f"svhn:{tmp_path}")


def test_set__covers_every_class_of_the_table() -> None:
    assert {"cifar10", "cifar100", "svhn", *FILE_SETS} == set(TORCHVISION_SETS)
