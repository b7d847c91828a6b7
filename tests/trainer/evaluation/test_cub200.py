"""CUB-200-2011 by its published lists: splits, classes, what is refused.

Run: pytest tests/trainer/evaluation/test_cub200.py
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from trainer.datasets import DataError
from trainer.evaluation.context import Evaluation

Make = Callable[..., Evaluation]
CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Ten images, numbered from 1 and turn by turn of either class; the last four are tested."""
    root = tmp_path / "CUB_200_2011"
    lines: dict[str, list[str]] = {name: [] for name in ("images", "labels", "split")}
    for number in range(1, 11):
        label = 1 + number % 2
        name = f"{CLASSES[label - 1]}/bird_{number}.jpg"
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (20 * number, 0, 0)).save(path)
        lines["images"].append(f"{number} {name}")
        lines["labels"].append(f"{number} {label}")
        lines["split"].append(f"{number} {int(number <= 6)}")
    for name, file in (
        ("images", "images.txt"),
        ("labels", "image_class_labels.txt"),
        ("split", "train_test_split.txt"),
    ):
        (root / file).write_text("\n".join(lines[name]) + "\n")
    (root / "classes.txt").write_text(f"1 {CLASSES[0]}\n2 {CLASSES[1]}\n")
    return root


def test_birds__as_published(make_evaluation: Make, birds: Path) -> None:
    dataset = make_evaluation(kind="cub200", root=str(birds)).dataset
    assert dataset.class_names == CLASSES
    assert not dataset.divided_by_seed
    assert dataset.train.labels.tolist() == [1, 0, 1, 0, 1, 0]  # number 1 is of class 2
    assert dataset.test.source.ids[0] == f"{CLASSES[1]}/bird_7.jpg"
    assert dataset.test.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("train_test_split.txt", None, "cannot be read"),
        ("train_test_split.txt", "1 1\n2 0\n", "do not list the same images, first 3"),
        ("image_class_labels.txt", "one 1\n", "cannot be read"),
        ("classes.txt", f"1 {CLASSES[0]}\n", "image 1 has the class 2"),
        ("images.txt", "\n".join(f"{n} ../{n}.jpg" for n in range(1, 11)), "outside images/"),
        ("train_test_split.txt", "\n".join(f"{n} 1" for n in range(1, 11)), "no image to test"),
    ],
)
def test_birds__of_damaged_lists(
    make_evaluation: Make, birds: Path, file: str, text: str | None, said: str
) -> None:
    if text is None:
        (birds / file).unlink()
    else:
        (birds / file).write_text(text)
    with pytest.raises(DataError, match=said):
        make_evaluation(kind="cub200", root=str(birds))
