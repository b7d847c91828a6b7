"""Tar shards: what is indexed, what is read, what is refused.

Run: pytest tests/trainer/test_datasets_shards.py
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataConfig, load_recipe
from trainer.datasets import DataError, open_source
from trainer.datasets.shards import expand_braces
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all, survey
from trainer.representation.preprocess import InputContract, prepare
from trainer.stock import CropStock


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed % 3, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _shards(root: Path, *, shards: int = 3, each: int = 4, labels: bool = True) -> Path:
    for shard in range(shards):
        members = []
        for i in range(shard * each, (shard + 1) * each):
            members.append((f"n{i % 2}/{i:03d}.png", _png(i)))
            members.append((f"n{i % 2}/{i:03d}.json", b"{}"))
            if labels:
                members.append((f"n{i % 2}/{i:03d}.cls", str(10 * (i % 2)).encode()))
        _tar(root / f"shard-{shard:03d}.tar", members)
    return root


def _config(**changes: object) -> DataConfig:
    return load_recipe("folder").data.model_copy(update={"max_skipped": 0.5, **changes})


def test_shards__file_folder_and_pattern(tmp_path: Path) -> None:
    root = _shards(tmp_path / "sets")
    every = open_source(str(root))
    assert every.ids[:2] == ("shard-000.tar/n0/000.png", "shard-000.tar/n1/001.png")
    assert len(every) == 12
    assert every.other_files == 12
    assert every.labels is not None
    assert every.labels.tolist() == [0, 1] * 6
    pattern = open_source(str(root / "shard-{000..002}.tar"))
    assert pattern.ids == every.ids
    assert pattern.fingerprint == every.fingerprint
    one = open_source(str(root / "shard-001.tar"))
    assert one.ids == every.ids[4:8]
    assert one.fingerprint != every.fingerprint


def test_shards__members_are_the_pictures_that_went_in(tmp_path: Path) -> None:
    source = open_source(str(_shards(tmp_path / "sets")))
    contract = InputContract(size_px=8)
    wanted = np.stack([prepare(_png(i), contract) for i in range(12)])
    assert (source.prepared([7, 0, 11], contract) == wanted[[7, 0, 11]]).all()
    with DecodePool(1) as pool:  # the members travel to another process
        assert (prepare_all(source, contract, pool) == wanted).all()


def test_shards__give_the_crops_of_the_same_files_in_a_folder(
    tmp_path: Path, images_of: Callable[..., list[list[np.ndarray]]]
) -> None:
    shards = open_source(str(_shards(tmp_path / "sets")))
    for i in range(12):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{i:03d}.png").write_bytes(_png(i))
    files = open_source(str(tmp_path / "files"))
    batches = [np.array([3, 11, 0]), np.array([5])]
    with DecodePool(0) as pool:
        found = survey(shards, pool, _config(), size_px=8)
        stocks = [
            CropStock(source, stored, pool, size_px=8, sizes=found.sizes)
            for source, stored in ((shards, found.stored), (shards, None), (files, None))
        ]
        for three in zip(*(images_of(stock.batches(batches)) for stock in stocks), strict=True):
            for a, b, c in zip(*three, strict=True):
                assert (a == b).all()
                assert (b == c).all()


def test_shards__labels_need_every_image_and_may_be_names(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    picture = _png(0)
    _tar(path, [("a.png", picture), ("a.cls", b"9"), ("b.png", picture), ("b.cls", b"10\n")])
    labels = open_source(str(path)).labels
    assert labels is not None
    assert labels.tolist() == [0, 1]  # 9 before 10
    _tar(path, [("a.png", picture), ("a.cls", b"dog"), ("b.png", picture), ("b.cls", b"cat")])
    labels = open_source(str(path)).labels
    assert labels is not None
    assert labels.tolist() == [1, 0]
    _tar(path, [("a.png", picture), ("a.cls", b"dog"), ("b.png", picture)])
    assert open_source(str(path)).labels is None


def test_shards__keys_end_at_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    members = [("v1.0/a.left.png", _png(0)), ("v1.0/a.cls", b"1"), ("v1.0/b.png", _png(1))]
    path = _tar(tmp_path / "a.tar", [*members, ("v1.0/b.cls", b"2")])
    labels = open_source(str(path)).labels
    assert labels is not None
    assert labels.tolist() == [0, 1]


def test_shards__pass_over_hidden_members_and_links(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [("a.png", _png(0)), ("._a.png", b"x")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert open_source(str(path)).ids == ("a.tar/a.png",)


def test_shards__names_that_cannot_be_ids_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.datasets.shards.MAX_MEMBER_BYTES", 2000)
    members = [("a.png", _png(0)), ("a.png", _png(1)), ("d/" * 300 + "b.png", b"x")]
    path = _tar(tmp_path / "a.tar", [*members, ("big.png", bytes(2001))])
    source = open_source(str(path))
    assert source.ids == ("a.tar/a.png",)
    assert [file.reason for file in source.skipped] == [
        "an earlier member has the same name: rename it",
        "its path has 611 characters, at most 512 can be an id",
        "it has 2,001 bytes, at most 2,000 are read",
    ]


def test_shards__damaged_members_are_skipped_and_counted(tmp_path: Path) -> None:
    good = [(f"{i}.png", _png(i)) for i in range(6)]
    bad = [("cut.png", _png(7)[:200]), ("empty.png", b""), ("text.jpg", b"no image")]
    source = open_source(str(_tar(tmp_path / "a.tar", [*good, *bad])))
    with DecodePool(0) as pool:
        found = survey(source, pool, _config(), size_px=8)
        assert [file.id for file in found.skipped] == [f"a.tar/{name}" for name, _ in bad]
        assert "the PNG is cut short" in found.skipped[0].reason
        assert len(found.source) == 6
        with pytest.raises(DataError, match="3 of 9 images cannot be used, more than the 10%"):
            survey(source, pool, _config(max_skipped=0.1), size_px=8)


def test_shards__that_shrink_afterwards(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [("a.png", _png(0))])
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"a\.tar/a\.png could be read.*bytes before this member"):
        source.prepared([0], InputContract(size_px=8))


def test_shards__fingerprint_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    a, b = ("a.png", _png(0)), ("b.png", _png(1))
    prints = {
        open_source(str(_tar(path, members))).fingerprint
        for members in (
            [a, b],
            [b, a],
            [a, ("b.png", _png(2))],
            [a, ("c.png", _png(1))],
            [a, ("a.cls", b"1"), b, ("b.cls", b"2")],
            [a, ("a.cls", b"1"), b, ("b.cls", b"3")],
        )
    }
    assert len(prints) == 6


def test_shards__cut_short_or_with_a_damaged_header(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [(f"{i}.png", _png(i)) for i in range(3)])
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1]
    for content, told in (
        (b"", "empty file"),
        (b"no tar" * 200, "truncated header|invalid header"),
        (whole[: second.offset_data + 100], "unexpected end of data"),
        (whole[: second.offset], rf"ends at byte {second.offset} without the mark"),
        (
            whole[: second.offset] + b"\xff" * 512 + whole[second.offset + 512 :],
            rf"header at byte {second.offset} is damaged, 1 members before",
        ),
        (gzip.compress(whole), "gunzip"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            open_source(str(path))


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("a.txt", b"x")], r"no image in them, 1 other members and 0 unusable"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], r"a\.cls is no text"),
        ([("a.png", b"x"), ("a.cls", b"1" * 257)], r"a\.cls has 257 bytes, wanted a class"),
    ],
)
def test_shards__of_another_form(
    tmp_path: Path, members: list[tuple[str, bytes]], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        open_source(str(_tar(tmp_path / "a.tar", members)))


def test_shards__missing_from_a_pattern(tmp_path: Path) -> None:
    root = _shards(tmp_path / "sets")
    with pytest.raises(DataError, match=r"2 of 5 shards are not there, first .*shard-003\.tar"):
        open_source(str(root / "shard-{000..004}.tar"))


def test_braces__count_with_the_first_numbers_width() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{0..1}/{3..4}") == ["0/3", "0/4", "1/3", "1/4"]
    assert expand_braces("a.tar") == ["a.tar"]
    for pattern in ("{5..4}", "{0..99999}{0..1}"):
        with pytest.raises(DataError, match="wanted a range that counts up"):
            expand_braces(pattern)


def test_folder__with_images_is_no_folder_of_shards(tmp_path: Path) -> None:
    root = _shards(tmp_path / "sets")
    (root / "own.png").write_bytes(_png(0))
    source = open_source(str(root))
    assert source.ids == ("own.png",)
    assert source.other_files == 3
