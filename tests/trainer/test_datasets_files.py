"""Text lists of paths.

Run: pytest tests/trainer/test_datasets_files.py
"""

from pathlib import Path

import pytest
from PIL import Image

from trainer.config import load_recipe
from trainer.datasets import DataError, open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import survey


def _save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)


def _list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_list__paths_start_at_its_folder_or_at_the_root_given(tmp_path: Path) -> None:
    _save(tmp_path / "b" / "x y.jpg", tmp_path / "a" / "1.jpg")
    path = _list(tmp_path / "train.txt", "b/x y.jpg 12", "", "a/1.jpg 3  ")
    source = open_source(str(path))
    assert source.ids == ("b/x y.jpg", "a/1.jpg")  # as listed
    assert source.pictures == [tmp_path / "b" / "x y.jpg", tmp_path / "a" / "1.jpg"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0]
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    path = path.rename(elsewhere / "train.txt")
    assert open_source(f"{path}:{tmp_path}").fingerprint == source.fingerprint
    with pytest.raises(DataError, match=r"nowhere, where the paths of .*train\.txt should start"):
        open_source(f"{path}:{tmp_path / 'nowhere'}")


def test_list__without_labels(tmp_path: Path) -> None:
    _save(tmp_path / "1.jpg", tmp_path / "2 3.jpg")
    source = open_source(str(_list(tmp_path / "train.txt", "2 3.jpg", "1.jpg")))
    assert source.labels is None
    assert source.ids == ("2 3.jpg", "1.jpg")


def test_list__fingerprint_follows_order_names_and_sizes(tmp_path: Path) -> None:
    _save(tmp_path / "1.jpg", tmp_path / "2.jpg")
    path = tmp_path / "train.txt"
    first = open_source(str(_list(path, "1.jpg", "2.jpg"))).fingerprint
    assert open_source(str(_list(path, "2.jpg", "1.jpg"))).fingerprint != first
    _list(path, "1.jpg", "2.jpg")
    (tmp_path / "2.jpg").write_bytes(b"x")
    shorter = open_source(str(path)).fingerprint
    (tmp_path / "2.jpg").unlink()
    assert len({first, shorter, open_source(str(path)).fingerprint}) == 3


def test_list__missing_files_are_skipped_by_the_first_pass(tmp_path: Path) -> None:
    _save(tmp_path / "1.jpg")
    source = open_source(str(_list(tmp_path / "train.txt", "1.jpg", "gone.jpg", "x" * 513)))
    config = load_recipe("folder").data
    with DecodePool(0) as pool:
        found = survey(source, pool, config.model_copy(update={"max_skipped": 0.7}), size_px=8)
        assert found.source.ids == ("1.jpg",)
        assert [file.reason for file in found.skipped] == [
            "its path has 513 characters, at most 512 can be an id",
            "the file cannot be opened: No such file or directory",
        ]
        with pytest.raises(DataError, match="2 of 3 images cannot be used"):
            survey(source, pool, config, size_px=8)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"\n \n", "lists no image"),
        (b"a.jpg 1\nb.jpg 2\na.jpg 3\n", r"line 3: a\.jpg stands there twice"),
        (b"a.jpg 1\nb.jpg\n", r"1 of 2 lines have a label, b\.jpg has none"),
    ],
)
def test_list__of_another_form(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=told):
        open_source(str(tmp_path / "train.txt"))
