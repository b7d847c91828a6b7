"""Where images come from: files, arrays, tar shards, tables, torchvision's sets.

In: SOURCE of the command line. Out: an `ImageSource` with stable ids, labels for the monitor only,
a fingerprint, and every image as the encoder will see it after training. No torch at import: the
decoding processes import this package.
"""

from pathlib import Path

from trainer.datasets.arrays import open_digits, open_packed
from trainer.datasets.files import open_folder, open_list, walk
from trainer.datasets.saved_datasets import is_saved_dataset, open_saved_dataset
from trainer.datasets.shards import expand_braces, is_remote, open_remote_shards, open_shards
from trainer.datasets.source import (
    DataError,
    ImageSource,
    Picture,
    Skipped,
    changed_meanwhile,
    prepared_picture,
    reduced_picture,
    split,
)
from trainer.datasets.tables import open_tables
from trainer.datasets.torchvision_sets import TORCHVISION_SETS, open_torchvision_set

__all__ = [
    "DIGITS",
    "SOURCES",
    "DataError",
    "ImageSource",
    "Picture",
    "Skipped",
    "changed_meanwhile",
    "open_source",
    "prepared_picture",
    "reduced_picture",
    "split",
]

DIGITS = "digits"
# One line for messages and for the command's help.
SOURCES = (
    "a folder of images, an .npz, a .txt list of paths (or LIST.txt:ROOT), .tar shards (a file, a "
    "folder, shard-{000..009}.tar, or such a URL), .parquet (a file or folder), a saved Hugging "
    f"Face dataset, NAME:ROOT with NAME one of {', '.join(TORCHVISION_SETS)}, or {DIGITS!r}"
)


def open_source(source: str) -> ImageSource:
    """Open SOURCE, see `SOURCES` for what it may be.

    Raises:
        DataError: nothing there, no image in it, or of another form.
    """
    if source == DIGITS:
        return open_digits()
    if is_remote(source):
        return open_remote_shards(source)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    head, colon, root = source.partition(":")
    if colon and head in TORCHVISION_SETS:
        return open_torchvision_set(head, Path(root))
    head, colon, root = source.rpartition(":")
    if colon and head.endswith(".txt") and Path(head).is_file():
        return open_list(Path(head), Path(root))
    names = expand_braces(source)
    if len(names) > 1:
        return open_shards([Path(name) for name in names])
    raise DataError(f"{source} does not exist: give {SOURCES}")


def _of_file(path: Path) -> ImageSource:
    if path.suffix == ".npz":
        return open_packed(path)
    if path.suffix == ".txt":
        return open_list(path, path.parent)
    if path.suffix == ".tar":
        return open_shards([path])
    if path.suffix == ".parquet":
        return open_tables([path], path.parent)
    raise DataError(f"{path} is a file of no known kind: give {SOURCES}")


def _of_folder(root: Path) -> ImageSource:
    """What a folder holds decides; image files win over archives that lie beside them."""
    if is_saved_dataset(root):
        return open_saved_dataset(root)
    try:
        return open_folder(root)
    except DataError:
        found = list(walk(root))
        tars = [path for path in found if path.suffix == ".tar"]
        parquets = [path for path in found if path.suffix == ".parquet"]
        if bool(tars) == bool(parquets):
            raise
        return open_shards(tars, root) if tars else open_tables(parquets, root)
