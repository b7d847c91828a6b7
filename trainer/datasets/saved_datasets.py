"""Datasets that Hugging Face's `save_to_disk` wrote, read without that library.

In: their folder. Out: an `ImageSource` of the cells of the Arrow files that state.json names.
"""

import json
from pathlib import Path
from typing import Any

from trainer.datasets.source import DataError, ImageSource
from trainer.datasets.tables import TRAIN_SPLIT, open_tables


def is_saved_dataset(root: Path) -> bool:
    """Whether a folder was written by Hugging Face's `save_to_disk`."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def open_saved_dataset(root: Path) -> ImageSource:
    """A Hugging Face `Dataset` on disk, or the split `train` of a `DatasetDict`.

    Raises:
        DataError: damaged, without `train`, or without a column of images.
    """
    if (root / "dataset_dict.json").is_file():
        splits = _json(root / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or TRAIN_SPLIT not in splits:
            raise DataError(
                f"{root} holds the splits {splits} and no {TRAIN_SPLIT!r}: give one of its folders"
            )
        root = root / TRAIN_SPLIT
    try:
        names = [entry["filename"] for entry in _json(root / "state.json")["_data_files"]]
        paths = [root / Path(name).name for name in names]  # never outside the folder
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{root / 'state.json'} names no data files: save the dataset again with save_to_disk"
        ) from error
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(
            f"{root} should hold {len(paths)} files, {len(missing)} are not there"
            f"{f', first {missing[0].name}' if missing else ''}: copy or save the dataset again"
        )
    return open_tables(paths, root)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): save the dataset again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no JSON object: save the dataset again")
    return content
