"""service.bulk.sources and tables: every image, in one order, with the trainer's id."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from service.bulk.sources import Source, SourceError, Unreadable, open_source
from tests.service.conftest import encoded
from trainer.datasets import open_source as open_for_training

PICTURES = [encoded(i, size=(10, 9)) for i in range(6)]


def everything(source: Source) -> dict[str, bytes | str]:
    return {
        source.ids[number]: content.reason if isinstance(content, Unreadable) else content
        for number, content in source.read(0, len(source))
    }


def write_folder(root: Path) -> Path:
    for i, picture in enumerate(PICTURES):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return root


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_table(path: Path, columns: Mapping[str, Any], rows_in_group: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows_in_group)
    return path


def test_folder__in_the_order_of_names_with_other_files_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos")
    (root / "notes.txt").touch()
    (root / ".hidden.png").touch()
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").touch()
    source = open_source(str(root))
    assert (source.kind, source.other_files, dict(source.unusable)) == ("folder", 2, {})
    assert everything(source) == {f"{'ab'[i % 2]}/{i}.png": PICTURES[i] for i in (0, 2, 4, 1, 3, 5)}
    assert [number for number, _ in source.read(2, 5)] == [2, 3, 4]


def test_folder__names_that_are_no_id_and_files_that_are_gone_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos")
    deep = root / ("x" * 250) / ("y" * 250) / ("z" * 30)
    deep.mkdir(parents=True)
    (deep / "1.png").write_bytes(PICTURES[0])
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).write_bytes(PICTURES[0])
    source = open_source(str(root))
    (root / "a" / "0.png").unlink()
    found = everything(source)
    told = {name: value for name, value in found.items() if isinstance(value, str)}
    assert len(found) == 8
    assert told["a/0.png"] == "it cannot be read: No such file or directory"
    assert told["?.png"] == "its name is not UTF-8: rename it"
    assert any(reason.startswith("its name has 538 characters, 1..512") for reason in told.values())


def test_shards__of_a_folder_and_of_a_pattern_are_the_same(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    for shard in (0, 1):
        members = {f"s/{i}.png": PICTURES[3 * shard + i] for i in range(3)}
        write_tar(root / f"train-{shard}.tar", {**members, "s/0.cls": b"1", "s/0.json": b"{}"})
    source = open_source(str(root))
    assert (source.kind, len(source), source.other_files) == ("webdataset", 6, 4)
    assert everything(source) == {
        f"train-{n // 3}.tar/s/{n % 3}.png": picture for n, picture in enumerate(PICTURES)
    }
    pattern = open_source(str(root / "train-{0..1}.tar"))
    assert (pattern.ids, pattern.marks) == (source.ids, source.marks)
    assert [number for number, _ in source.read(2, 4)] == [2, 3]


def test_shards__a_name_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for picture in PICTURES[:2]:
            info = tarfile.TarInfo("a.png")
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
    found = [content for _, content in open_source(str(path)).read(0, 2)]
    assert found == [PICTURES[0], Unreadable("an earlier image has the same name: rename it")]


def test_shards__that_are_cut_short_or_compressed_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": PICTURES[0]})
    content = path.read_bytes()
    path.write_bytes(content[: 512 + 512 * (len(PICTURES[0]) // 512 + 1)])
    with pytest.raises(SourceError, match="damaged or was cut short"):
        open_source(str(path))
    path.write_bytes(b"\x1f\x8b" + content)
    with pytest.raises(SourceError, match="uncompressed tar"):
        open_source(str(path))


def hugging_face(pictures: list[bytes | None]) -> pyarrow.Array:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(pictures)], kind)


def test_tables__of_hugging_face_and_of_plain_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "t" / "a.parquet", {"image": hugging_face([*PICTURES, None] * 2)})
    write_table(tmp_path / "t" / "b.parquet", {"image": PICTURES[:3], "label": [0, 1, 0]}, 2)
    source = open_source(str(tmp_path / "t"))
    found = everything(source)
    assert (source.kind, len(found)) == ("parquet", 17)
    assert found["a.parquet/00"] == found["a.parquet/07"] == PICTURES[0]
    assert found["a.parquet/06"] == "the row holds no bytes"
    assert found["b.parquet/2"] == PICTURES[2]
    for first, last in ((0, 17), (5, 9), (13, 16), (14, 15), (16, 17)):
        numbers = [number for number, _ in source.read(first, last)]
        assert numbers == list(range(first, last))
        assert {source.ids[n]: c for n, c in source.read(first, last) if isinstance(c, bytes)} == {
            source.ids[n]: found[source.ids[n]]
            for n in numbers
            if isinstance(found[source.ids[n]], bytes)
        }


def test_tables__of_paths(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos")
    names = ["a/0.png", "b/1.png", "../x.png", "/etc/x.png", "a/9.png", None, "a/0.png"]
    path = write_table(tmp_path / "t.parquet", {"file_name": names})
    found = [content for _, content in open_source(str(path), images=root).read(0, 7)]
    assert found[:2] == [PICTURES[0], PICTURES[1]]
    reasons = [content.reason for content in found[2:] if isinstance(content, Unreadable)]
    assert [reason[:24] for reason in reasons] == [
        "its path leads out of th",
        "its path leads out of th",
        "it cannot be read: No su",
        "its name has 0 character",
        "an earlier image has the",
    ]
    named = open_source(str(path), images=root, column="file_name")
    assert named.marks == open_source(str(path), images=root).marks


@pytest.mark.parametrize("kind", ["folder", "shards", "tables"])
def test_ids__are_those_of_training(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if kind == "folder":
        write_folder(root)
    elif kind == "shards":
        write_tar(root / "a-0.tar", {f"{i}.png": p for i, p in enumerate(PICTURES)})
    else:
        write_table(root / "a.parquet", {"image": hugging_face(list(PICTURES) * 2)})
    assert tuple(open_source(str(root)).ids) == open_for_training(str(root)).ids


def test_fingerprint__changes_with_a_name_a_size_and_a_time(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos")
    first = root / "a" / "0.png"

    def of(begin: int, end: int) -> str:
        return open_source(str(root)).fingerprint(begin, end)

    seen = [(of(0, 3), of(3, 6))]
    os.utime(first, ns=(1, 1))
    seen.append((of(0, 3), of(3, 6)))
    first.write_bytes(PICTURES[0] + b"x")
    os.utime(first, ns=(1, 1))
    seen.append((of(0, 3), of(3, 6)))
    first.rename(first.with_name("00.png"))
    seen.append((of(0, 3), of(3, 6)))
    assert len({one for one, _ in seen}) == 4
    assert len({other for _, other in seen}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "none.tar", "none.tar does not exist"),
        (lambda root: root / "a-{3..1}.tar", "wanted a range that counts up"),
        (lambda root: root / "a-{0..999999}.tar", "at most 100,000"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "holds no image, 0 other files"),
        (lambda root: write_tar(root / "a.tar", {"x.txt": b""}), "no image, 1 others"),
        (lambda root: write_table(root / "a.parquet", {"x": [1]}), r"no column 'image'.*x \(int64"),
        (lambda root: write_table(root / "a.parquet", {"image": [1]}), "no column"),
        (
            lambda root: write_table(root / "a.parquet", {"path": pyarrow.array([], "string")}),
            "row",
        ),
        (lambda root: write_table(root / "a.parquet", {"img": pyarrow.array([], "binary")}), "row"),
        (lambda root: (root / "a.parquet").write_bytes(b"x") and root / "a.parquet", "as a parq"),
        (lambda root: (root / "a.zip").write_bytes(b"x") and root / "a.zip", "holds .zip: wanted"),
    ],
)
def test_source__that_holds_nothing_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(make(tmp_path)))


def test_source__of_several_kinds_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.png": PICTURES[0]})
    (tmp_path / "b.jpg").touch()
    with pytest.raises(SourceError, match=r"a\.tar and images such as b\.jpg"):
        open_source(str(tmp_path))
    (tmp_path / "b.jpg").unlink()
    write_table(tmp_path / "b.parquet", {"image": PICTURES})
    with pytest.raises(SourceError, match=r"holds \.parquet, \.tar"):
        open_source(str(tmp_path))
    write_table(tmp_path / "p" / "a.parquet", {"image": PICTURES})
    write_table(tmp_path / "p" / "b.parquet", {"path": ["x"]})
    with pytest.raises(SourceError, match="some tables hold images, others paths"):
        open_source(str(tmp_path / "p"))
