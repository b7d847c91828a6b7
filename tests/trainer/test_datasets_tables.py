"""Tables: parquet files, and datasets saved as Hugging Face's library does.

Run: pytest tests/trainer/test_datasets_tables.py
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from trainer.config import DataConfig, load_recipe
from trainer.datasets import DataError, open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all, survey
from trainer.representation.preprocess import InputContract, prepare
from trainer.stock import CropStock


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed % 3, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _struct(contents: Sequence[bytes | None]) -> pyarrow.Array:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": content, "path": "somewhere.png"} for content in contents]
    return pyarrow.array(rows, kind)


def _table(first: int, count: int, **more: Any) -> pyarrow.Table:
    images = [_png(i) for i in range(first, first + count)]
    labels = [5 * (i % 2) for i in range(first, first + count)]
    return pyarrow.table({"image": _struct(images), "label": labels, **more})


def _parquet(path: Path, table: pyarrow.Table, rows: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows, **options)
    return path


def _saved(root: Path, table: pyarrow.Table, files: int = 2) -> Path:
    """As `Dataset.save_to_disk`: Arrow streams that state.json names."""
    root.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    each = -(-len(table) // files)
    for i, name in enumerate(names):
        part = table.slice(i * each, each)
        with pyarrow.ipc.new_stream(str(root / name), table.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (root / "dataset_info.json").write_text("{}")
    return root


def _config(**changes: object) -> DataConfig:
    return load_recipe("folder").data.model_copy(update={"max_skipped": 0.5, **changes})


def _parquets(root: Path) -> Path:
    _parquet(root / "b.parquet", _table(4, 4))
    _parquet(root / "a.parquet", _table(0, 4))
    return root


WRITERS: list[Callable[[Path], Path]] = [_parquets, lambda root: _saved(root, _table(0, 8))]


@pytest.mark.parametrize("write", WRITERS, ids=["parquet", "saved"])
def test_table__gives_the_pictures_that_went_in(
    tmp_path: Path,
    write: Callable[[Path], Path],
    images_of: Callable[..., list[list[np.ndarray]]],
) -> None:
    source = open_source(str(write(tmp_path / "set")))
    assert len(source) == len(set(source.ids)) == 8
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1] * 4
    contract = InputContract(size_px=8)
    wanted = np.stack([prepare(_png(i), contract) for i in range(8)])
    assert (source.prepared([7, 0, 3], contract) == wanted[[7, 0, 3]]).all()
    with DecodePool(1) as pool:  # the cells travel to another process
        assert (prepare_all(source, contract, pool) == wanted).all()
    batches = [np.array([3, 7, 0]), np.array([5])]
    with DecodePool(0) as pool:
        found = survey(source, pool, _config(), size_px=8)
        stocks = [
            CropStock(source, stored, pool, size_px=8, sizes=found.sizes)
            for stored in (found.stored, None)
        ]
        held, streamed = (images_of(stock.batches(batches)) for stock in stocks)
        for one, two in zip(held, streamed, strict=True):
            assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_table__ids_are_file_and_row(tmp_path: Path) -> None:
    assert open_source(str(_parquets(tmp_path))).ids[2:6] == (
        "a.parquet/2",
        "a.parquet/3",
        "b.parquet/0",
        "b.parquet/1",
    )
    saved = open_source(str(_saved(tmp_path / "saved", _table(0, 3))))
    assert saved.ids == (
        "data-00000-of-00002.arrow/0",
        "data-00000-of-00002.arrow/1",
        "data-00001-of-00002.arrow/0",
    )
    path = _parquet(tmp_path / "x" / "c.parquet", _table(0, 11))
    assert open_source(str(path)).ids[::5] == ("c.parquet/00", "c.parquet/05", "c.parquet/10")


@pytest.mark.parametrize(
    "columns",
    [
        {"photo": [_png(0), _png(1)]},
        {"photo": pyarrow.array([_png(0), _png(1)], pyarrow.large_binary())},
        {"mask": [b"x", b"y"], "img": [_png(0), _png(1)]},
        {"img": [b"x", b"y"], "image": _struct([_png(0), _png(1)])},
        {"image": ["a.png", "b.png"], "raw": [_png(0), _png(1)]},
    ],
)
def test_table__column_is_named_image_or_img_or_the_only_one(
    tmp_path: Path, columns: dict[str, Any]
) -> None:
    source = open_source(str(_parquet(tmp_path / "a.parquet", pyarrow.table(columns))))
    assert source.labels is None
    contract = InputContract(size_px=8)
    assert (source.prepared([1], contract)[0] == prepare(_png(1), contract)).all()


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"name": ["a"], "n": [1]},
            r"0 columns that could .* name \(string\), n \(int64\): wanted",
        ),
        ({"a": [b"x"], "b": [b"y"]}, r"2 columns that could .* a \(binary\), b \(binary\)"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "hold no row"),
    ],
)
def test_table__without_a_column_of_images(
    tmp_path: Path, columns: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        open_source(str(_parquet(tmp_path / "a.parquet", pyarrow.table(columns))))


def test_table__files_of_different_columns(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", _table(0, 2))
    _parquet(tmp_path / "b.parquet", pyarrow.table({"photo": [_png(0)]}))
    with pytest.raises(DataError, match=r"b\.parquet has no column 'image' .* photo \(binary\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "labels",
    [[1, None], [-1, -1], ["cat", "dog"], [0.5, 1.5]],
    ids=["null", "unknown", "text", "float"],
)
def test_table__labels_that_are_no_classes(tmp_path: Path, labels: list[Any]) -> None:
    table = pyarrow.table({"image": [_png(0), _png(1)], "label": labels})
    assert open_source(str(_parquet(tmp_path / "a.parquet", table))).labels is None


def test_table__damaged_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    contents = [_png(0), None, b"", _png(3)[:100], *(_png(i) for i in range(4, 9))]
    table = pyarrow.table({"image": _struct(contents)})
    source = open_source(str(_parquet(tmp_path / "a.parquet", table)))
    with DecodePool(0) as pool:
        found = survey(source, pool, _config(), size_px=8)
        assert [file.id for file in found.skipped] == [f"a.parquet/{i}" for i in (1, 2, 3)]
        assert "holds no bytes in this row" in found.skipped[0].reason
        assert "0 bytes" in found.skipped[1].reason
        assert "the PNG is cut short" in found.skipped[2].reason
        with pytest.raises(DataError, match="3 of 9 images cannot be used, more than the 10%"):
            survey(source, pool, _config(max_skipped=0.1), size_px=8)


def test_table__damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", _table(0, 9), compression="zstd", use_dictionary=False)
    group = parquet.read_metadata(path).row_group(1)
    offset = next(
        group.column(i).data_page_offset
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == "image.bytes"
    )
    content = bytearray(path.read_bytes())
    content[offset : offset + 60] = b"\xff" * 60
    path.write_bytes(content)
    with DecodePool(0) as pool:
        found = survey(open_source(str(path)), pool, _config(), size_px=8)
    assert [file.id for file in found.skipped] == [f"a.parquet/{i}" for i in (3, 4, 5)]
    assert "row group 1 of" in found.skipped[0].reason
    assert len(found.source) == 6


def test_table__row_group_past_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.datasets.tables.MAX_ROW_GROUP_BYTES", 1000)
    path = _parquet(tmp_path / "a.parquet", _table(0, 6))
    with pytest.raises(DataError, match=r"row group 0 holds 2,\d\d\d bytes .* row_group_size=100"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["a.parquet", "set/data-00000-of-00001.arrow"])
def test_table__that_is_damaged(tmp_path: Path, name: str) -> None:
    _parquet(tmp_path / "a.parquet", _table(0, 4))
    _saved(tmp_path / "set", _table(0, 4), files=1)
    path = tmp_path / name
    whole = path.read_bytes()
    for content in (b"", b"no table", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name} cannot be read as a table"):
            open_source(str(tmp_path / name.split("/")[0]))


def test_table__fingerprint_follows_rows_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    swapped = pyarrow.array([5, 0, 0, 5])
    parquet_prints = {
        open_source(str(_parquet(path, table))).fingerprint
        for table in (
            _table(0, 4),
            _table(1, 4),
            _table(0, 5),
            _table(0, 4).set_column(1, "label", [swapped]),
        )
    }
    assert len(parquet_prints) == 4
    saved_prints = {
        open_source(str(_saved(tmp_path / str(i), table))).fingerprint
        for i, table in enumerate((_table(0, 4), _table(0, 5)))
    }
    assert len(saved_prints) == 2
    labels = [
        open_source(str(_saved(tmp_path / f"labels{i}", table))).fingerprint
        for i, table in enumerate((_table(0, 4), _table(0, 4).set_column(1, "label", [swapped])))
    ]
    assert labels[0] != labels[1]


def test_parquet__named_by_split_gives_train(tmp_path: Path) -> None:
    for split, count in (("test", 2), ("train", 3)):
        _parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", _table(0, count))
    source = open_source(str(tmp_path))
    assert source.ids[0] == "data/train-00000-of-00001.parquet/0"
    assert len(source) == 3
    assert source.other_files == 1


def test_saved__dict_gives_train(tmp_path: Path) -> None:
    _saved(tmp_path / "train", _table(0, 4))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert len(open_source(str(tmp_path))) == 4
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(DataError, match=r"the splits \['test'\] and no 'train': give one"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("{", r"state\.json cannot be read"),
        ("[]", "is no JSON object"),
        ("{}", "names no data files"),
        ('{"_data_files": []}', "should hold 0 files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"1 are not there, first x\.arrow"),
    ],
)
def test_saved__of_another_form(tmp_path: Path, state: str, told: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=told):
        open_source(str(tmp_path))
