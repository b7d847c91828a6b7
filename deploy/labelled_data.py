"""What ./deploy/quickstart has evaluated: names the labelled pictures for the service.

In: what was trained on. Out: HOME/datasets.yaml with one data set: the digits, those that were held
out of training as the test split (a fifth where none was trained on), or a folder whose sub-folders
are classes. Nothing where there are no labels.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from trainer.representation.bundle import BundleError, open_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="what was trained on, if not the digits")
    arguments = parser.parse_args()
    file = arguments.home / "datasets.yaml"
    if arguments.folder is None:
        try:
            trained_on = set(open_bundle(arguments.bundle).gallery().ids)
        except BundleError as error:
            sys.exit(f"error: {error}")
        _write_digits(arguments.home / "labelled", trained_on)
        entries = {"digits": {"kind": "npz", "root": "labelled"}}
    elif _has_classes(arguments.folder):
        root = str(arguments.folder.absolute())
        entries = {"pictures": {"kind": "folder", "root": root}}
    else:
        file.unlink(missing_ok=True)
        return
    file.write_text(json.dumps(entries) + "\n", encoding="utf-8")  # JSON is YAML


def _write_digits(folder: Path, trained_on: set[str]) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 on paper
    images = np.repeat(pixels[..., None], 3, axis=3)
    seen = np.array([f"{index:04d}" in trained_on for index in range(len(images))])
    if not seen.any():  # an encoder of other pictures
        seen = np.arange(len(images)) % 5 != 0
    folder.mkdir(exist_ok=True)
    for name, mine in (("train", seen), ("test", ~seen)):
        np.savez(folder / f"{name}.npz", images=images[mine], labels=digits.target[mine])


def _has_classes(folder: Path) -> bool:
    """Two sub-folders at least, and no file beside them."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return len(inside) >= 2 and all(path.is_dir() for path in inside)


if __name__ == "__main__":
    main()
