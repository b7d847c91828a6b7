"""Labelled data sets: every kind gives the same splits and classes, and says what is wrong.

Run: pytest tests/trainer/evaluation/test_datasets.py
"""

import csv
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from trainer.datasets import DataError
from trainer.evaluation.datasets import open_dataset
from trainer.evaluation.job import JobError, load_job, parse_job
from trainer.evaluation.labelled import LabelledDataset

from .conftest import draw_images

MakeFolder = Callable[..., Path]


def opened(seed: int = 0, **values: Any) -> LabelledDataset:
    job = parse_job(
        {"protocol": "knn", "bundle": "b", "dataset": {"name": "set", **values}, "seed": seed}
    )
    return open_dataset(job.dataset, seed=seed)


def _png(colour: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


def test_folder__with_splits(make_folder: MakeFolder) -> None:
    make_folder("train", ("cat", "dog"), 4)
    root = make_folder("test", ("cat", "dog"), 2)
    found = opened(kind="folder", root=str(root))
    assert found.class_names == ("cat", "dog")
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert not found.divided_by_seed
    assert found.validation is None
    make_folder("val", ("cat", "dog"), 1)
    whole = opened(kind="folder", root=str(root))
    assert whole.validation is not None
    assert whole.fingerprint != found.fingerprint


def test_folder__whose_only_other_split_is_val_is_tested_on_it(make_folder: MakeFolder) -> None:
    make_folder("train", count=3)
    found = opened(kind="folder", root=str(make_folder("val", count=2)))
    assert set(found.splits) == {"train", "test"}
    assert len(found.test) == 4


def test_folder__without_splits_is_divided_by_seed_each_class_alike(
    make_folder: MakeFolder,
) -> None:
    root = str(make_folder(count=10))
    one, again, other = (opened(seed, kind="folder", root=root) for seed in (0, 0, 1))
    assert one.divided_by_seed
    assert one.test.source.ids == again.test.source.ids != other.test.source.ids
    assert np.bincount(one.test.labels).tolist() == [2, 2]
    assert np.bincount(one.train.labels).tolist() == [8, 8]
    assert not set(one.test.source.ids) & set(one.train.source.ids)
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_folder__of_a_class_that_only_the_test_split_has(make_folder: MakeFolder) -> None:
    make_folder("train", ("a", "b"))
    root = make_folder("test", ("a", "c"))
    with pytest.raises(DataError, match=r"set: the class 'c' has no training image"):
        opened(kind="folder", root=str(root))


def test_folder__with_an_empty_class(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"the class 'empty' has no image"):
        opened(kind="folder", root=str(root))


def test_folder__of_one_class(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match=r"one class only, 'a'"):
        opened(kind="folder", root=str(make_folder(classes=("a",))))


def test_folder__with_images_beside_the_classes(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "stray.png").write_bytes(_png(1))
    with pytest.raises(DataError, match=r"1 images lie beside .* first stray\.png"):
        opened(kind="folder", root=str(root))


@pytest.mark.parametrize("kind", ["folder", "npz", "table", "voc", "webdataset"])
def test_root__that_does_not_exist(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(kind=kind, root=str(tmp_path / "nothing"))


def test_packed__labels_may_be_named_and_must_be_in_range(tmp_path: Path) -> None:
    images, labels = draw_images(30)
    path = tmp_path / "set.npz"
    np.savez(path, images=images, y=labels)
    found = opened(kind="npz", root=str(path), label="y", class_names=["a", "b", "c"])
    assert found.class_names == ("a", "b", "c")
    assert len(found.test) == 6
    with pytest.raises(DataError, match=r"no array 'z', only \['images', 'y'\]"):
        opened(kind="npz", root=str(path), label="z")
    with pytest.raises(DataError, match=r"labels out of range: .* has '2', but class_names .* 2"):
        opened(kind="npz", root=str(path), label="y", class_names=["a", "b"])
    with pytest.raises(DataError, match=r"the class 'd' has no training image"):
        opened(kind="npz", root=str(path), label="y", class_names=["a", "b", "c", "d"])
    np.savez(path, images=images, labels=labels - 1)
    with pytest.raises(DataError, match=r"labels out of range: '-1'"):
        opened(kind="npz", root=str(path))
    np.savez(path, images=images, labels=labels / 2)
    with pytest.raises(DataError, match=r"float64, wanted integers"):
        opened(kind="npz", root=str(path))
    np.savez(path, images=images)
    with pytest.raises(DataError, match=r"no array 'labels'"):
        opened(kind="npz", root=str(path))


def test_packed__folder_without_usual_names(tmp_path: Path, packed_folder: Path) -> None:
    (tmp_path / "a.npz").write_bytes((packed_folder / "train.npz").read_bytes())
    with pytest.raises(DataError, match=r"holds 'a\.npz': wanted train\.npz and test\.npz"):
        opened(kind="npz", root=str(tmp_path))
    found = opened(kind="npz", root=str(tmp_path), splits={"train": "a.npz"})
    assert found.divided_by_seed


def test_packed__classes_keep_their_numbers_when_a_split_lacks_one(tmp_path: Path) -> None:
    images, labels = draw_images(12)
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    np.savez(tmp_path / "test.npz", images=images[labels > 0], labels=labels[labels > 0])
    found = opened(kind="npz", root=str(tmp_path))
    assert found.test.labels.tolist() == labels[labels > 0].tolist()


def _table(root: Path, rows: list[tuple[str, str, str]]) -> Path:
    for name, _, _ in rows:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(hash(name) % 255))
    with (root / "set.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows(rows)
    return root / "set.csv"


ROWS = [
    ("x/1.png", "b", "train"),
    ("x/2.png", "a", "train"),
    ("x/3.png", "b", "test"),
    ("x/4.png", "a", "val"),
]


def test_table__csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    path = _table(tmp_path, ROWS)
    names, labels, splits = map(list, zip(*ROWS, strict=True))
    table = pyarrow.table({"path": names, "label": labels, "split": splits})
    parquet.write_table(table, tmp_path / "set.parquet")
    for file in (path, tmp_path / "set.parquet"):
        found = opened(kind="table", root=str(file))
        assert found.class_names == ("a", "b")
        assert found.train.source.ids == ("x/1.png", "x/2.png")
        assert found.train.labels.tolist() == [1, 0]
        assert found.test.labels.tolist() == [1]
        assert found.validation is not None
        assert found.validation.labels.tolist() == [0]


def test_table__parquet_of_images(tmp_path: Path) -> None:
    cells = [_png(i) for i in range(10)]
    table = pyarrow.table({"image": cells, "kind": ["n", "m"] * 5})
    parquet.write_table(table, tmp_path / "set.parquet")
    found = opened(kind="table", root=str(tmp_path / "set.parquet"), label="kind")
    assert found.class_names == ("m", "n")
    assert len(found.train) == 8
    with pytest.raises(DataError, match=r"no column 'label'"):
        opened(kind="table", root=str(tmp_path / "set.parquet"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("../1.png", "a", "train"), "lies outside"),
        (("/etc/1.png", "a", "train"), "lies outside"),
        (("x/1.png", "a", "train"), "names x/1.png twice"),
        (("x/9.png", "", "train"), "data row 5 has no label"),
        (("x/9.png", "a", "maybe"), r"says \['maybe'\]"),
    ],
)
def test_table__with_a_bad_row(tmp_path: Path, row: tuple[str, str, str], said: str) -> None:
    path = _table(tmp_path / "in", ROWS)
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(row)
    with pytest.raises(DataError, match=said):
        opened(kind="table", root=str(path))


def test_table__with_other_columns(tmp_path: Path) -> None:
    path = _table(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"no column 'class', only \['label', 'path', 'split'\]"):
        opened(kind="table", root=str(path), label="class")


def test_lists__as_places205(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(_png(i))
    (tmp_path / "train.csv").write_text("0.png 3\n1.png 20\n2.png 3\n")
    (tmp_path / "val.csv").write_text("3.png 20\n")
    splits = {"train": "train.csv", "test": "val.csv"}
    found = opened(kind="list", root=str(tmp_path), splits=splits)
    assert found.class_names == ("3", "20")
    assert found.test.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"labels out of range: the split train has '3', '20'"):
        opened(kind="list", root=str(tmp_path), splits=splits, class_names=["a", "b"])


def _shard(path: Path, samples: list[tuple[str, str]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, label in samples:
            for name, content in ((f"{key}.png", _png(9)), (f"{key}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_shards__by_usual_names_and_by_pattern(tmp_path: Path) -> None:
    _shard(tmp_path / "train-000.tar", [("a", "0"), ("b", "1")])
    _shard(tmp_path / "train-001.tar", [("c", "2")])
    _shard(tmp_path / "val-000.tar", [("d", "2")])
    for splits in (None, {"train": "train-{000..001}.tar", "test": "val-000.tar"}):
        found = opened(kind="webdataset", root=str(tmp_path), splits=splits)
        assert found.train.labels.tolist() == [0, 1, 2]
        assert found.test.labels.tolist() == [2]


def test_torchvision__gives_the_published_test_split(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    draw = np.random.default_rng(0)
    for seat, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {
            "data": draw.integers(0, 256, (4, 3072)).astype(np.uint8),
            "labels": [seat % 3, 0, 1, 2],
        }
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
        found = opened(kind="torchvision", set="cifar10", root=str(tmp_path))
    assert len(found.train) == 20
    assert found.test.labels.tolist() == [2, 0, 1, 2]
    with pytest.raises(JobError, match="set='mnist'"):
        opened(kind="torchvision", set="mnist", root=str(tmp_path))


def test_labels__of_several_classes_an_image_are_refused_where_one_is_wanted(
    voc_tree: Path,
) -> None:
    found = opened(kind="voc", root=str(voc_tree), class_names=["dark", "light"])
    with pytest.raises(JobError, match="several classes each"):
        _ = found.train.labels


def test_job__with_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"protocol": "knn", "dataset": {"kind": 1, "kind": 2}}')
    with pytest.raises(JobError, match="has the key 'kind' twice; say it once"):
        load_job(tmp_path / "job.json")
