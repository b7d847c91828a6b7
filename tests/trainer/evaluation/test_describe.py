"""trainer.evaluation.describe: every kind of data set is told, and what is wrong with one.

Run: pytest tests/trainer/evaluation/test_describe.py
"""

import csv
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.evaluation import describe

Describe = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Describe:
    """tell(*flags, kind=..., root=..., ...) -> exit code, the answer."""
    monkeypatch.setattr(os, "nice", lambda increment: increment)  # of the tests' own process

    def run(*flags: str, **spec: Any) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "spec.json"
        path.write_text(json.dumps({"name": "set", **spec}))
        code = describe.main(["--dataset", str(path), *flags])
        return code, json.loads(capsys.readouterr().out)

    return run


def png(colour: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


def folder(root: Path) -> dict[str, Any]:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                (root / split / label / f"{i}.png").write_bytes(png(i))
    return {"kind": "folder", "root": str(root)}


def packed(root: Path) -> dict[str, Any]:
    root.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        images = np.zeros((count, 8, 8, 3), np.uint8)
        np.savez(root / f"{split}.npz", images=images, labels=np.arange(count) % 2)
    return {"kind": "npz", "root": str(root), "class_names": ["a", "b"]}


def torchvision(root: Path) -> dict[str, Any]:
    below = root / "cifar-10-batches-py"
    below.mkdir(parents=True)
    meta = {"label_names": ["a", "b"]}
    (below / "batches.meta").write_bytes(pickle.dumps(meta))
    return {"kind": "torchvision", "set": "cifar10", "root": str(root)}


def table(root: Path) -> dict[str, Any]:
    root.mkdir()
    with (root / "labels.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "split"])
        for i in range(10):
            (root / f"{i}.png").write_bytes(png(i))
            lines.writerow([f"{i}.png", "ab"[i % 2], "train" if i < 6 else "test"])
    return {"kind": "table", "root": str(root / "labels.csv")}


def lists(root: Path) -> dict[str, Any]:
    root.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        lines = []
        for i in range(count):
            (root / f"{split}{i}.png").write_bytes(png(i))
            lines.append(f"{split}{i}.png {i % 2}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    splits = {"train": "train.txt", "test": "test.txt"}
    return {"kind": "list", "root": str(root), "splits": splits, "class_names": ["a", "b"]}


def shards(root: Path) -> dict[str, Any]:
    root.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        with tarfile.open(root / f"{split}-000.tar", "w") as tar:
            for i in range(count):
                for name, content in ((f"{i}.cls", str(i % 2).encode()), (f"{i}.png", png(i))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {"kind": "webdataset", "root": str(root), "class_names": ["a", "b"]}


@pytest.mark.parametrize("make", [folder, packed, table, lists, shards])
def test_described__every_kind_with_one_class_an_image(
    make: Callable[[Path], dict[str, Any]], tmp_path: Path, tell: Describe
) -> None:
    code, answer = tell(**make(tmp_path / "set"))
    found = answer["description"]
    assert code == 0
    assert found["counts"] == {"train": 6, "test": 4}
    assert (found["task"], found["classes"], found["class_names"]) == (
        "single_label",
        2,
        ["a", "b"],
    )
    assert found["divided_by_seed"] is False
    assert len(found["fingerprint"]) == 64
    assert "broken" not in found


def test_described__voc_has_several_classes_an_image(voc_tree: Path, tell: Describe) -> None:
    _, answer = tell(kind="voc", root=str(voc_tree), class_names=["dark", "light"])
    found = answer["description"]
    assert (found["task"], found["counts"]) == ("multi_label", {"train": 24, "test": 12})


def test_described__torchvision_says_what_is_missing(tmp_path: Path, tell: Describe) -> None:
    code, answer = tell(**torchvision(tmp_path / "set"))
    assert (code, answer["error"]["code"]) == (2, "dataset_invalid")


def test_described__without_the_trainer_says_what_to_install(
    tmp_path: Path, tell: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(describe, "open_dataset", missing)
    code, answer = tell(**folder(tmp_path / "set"))
    assert (code, answer["error"]["code"]) == (2, "trainer_missing")
    assert "needs torchvision, which is not installed" in answer["error"]["message"]


def test_described__a_folder_without_splits_is_divided(tmp_path: Path, tell: Describe) -> None:
    root = Path(folder(tmp_path / "set")["root"]) / "train"
    _, answer = tell(kind="folder", root=str(root), test_share=0.34)
    assert answer["description"]["divided_by_seed"] is True
    assert answer["description"]["counts"] == {"train": 4, "test": 2}


def test_broken__images_are_counted_and_named_by_split(tmp_path: Path, tell: Describe) -> None:
    spec = folder(tmp_path / "set")
    (tmp_path / "set" / "train" / "b" / "1.png").write_bytes(png(1)[:40])
    code, answer = tell("--images", **spec)
    assert code == 0
    (split,) = answer["description"]["broken"].items()
    assert split[0] == "train"
    assert split[1]["count"] == 1
    assert split[1]["first"][0]["id"] == "b/1.png"
    assert split[1]["first"][0]["reason"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: {"root": str(root / "gone")}, "does not exist"),
        (lambda root: (root / "train" / "c").mkdir() or {}, "the class 'c' has no image"),
        (lambda root: {"rooot": "x"}, "there is no key 'rooot'"),
        (lambda root: {"test_share": 2}, "test_share=2"),
        (lambda root: {"splits": {"train": "train/a", "test": "test"}}, "beside the classes"),
    ],
)
def test_error__says_what_is_wrong(
    spoil: Callable[[Path], dict[str, Any]], message: str, tmp_path: Path, tell: Describe
) -> None:
    spec = folder(tmp_path / "set")
    code, answer = tell(**{**spec, **spoil(Path(spec["root"]))})
    assert code == 2
    assert message in answer["error"]["message"]
