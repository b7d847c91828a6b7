"""service.bulk.parts: a part is whole or not there, wherever writing ends."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from service.bulk.parts import (
    MANIFEST,
    Output,
    OutputError,
    Plan,
    Rejected,
    read_manifest,
    read_parts,
)

DIM = 4
PLAN = Plan("m" * 64, "embedding", DIM, "fp32", "folder", 6, 2, ("f0", "f1", "f2"))


def rows(number: int) -> NDArray[np.float32]:
    return np.full((2, DIM), number, np.float32)


def write(output: Output, number: int) -> None:
    ids = [(f"{number}-{i}", 2 * number + i) for i in range(2)]
    rejected = [Rejected(f"bad-{number}", 99, "broken")] if number == 1 else []
    output.write(number, ids, rows(number), rejected)


def whole(directory: Path) -> None:
    with Output(directory, PLAN) as output:
        for number in output.missing():
            write(output, number)
        output.finish()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_output__is_pairs_of_npy_and_parquet_and_the_rejected(tmp_path: Path) -> None:
    whole(tmp_path)
    assert sorted(contents(tmp_path)) == [
        "lock", "manifest.json", "part-00000.npy", "part-00000.parquet", "part-00001.npy",
        "part-00001.parquet", "part-00001.rejected.parquet", "part-00002.npy",
        "part-00002.parquet", "rejected.parquet",
    ]  # fmt: skip
    assert np.load(tmp_path / "part-00002.npy").tolist() == rows(2).tolist()
    assert parquet.read_table(tmp_path / "part-00002.parquet").to_pylist() == [
        {"id": "2-0", "number": 4},
        {"id": "2-1", "number": 5},
    ]
    assert parquet.read_table(tmp_path / "rejected.parquet").to_pylist() == [
        {"id": "bad-1", "number": 99, "reason": "broken"}
    ]
    manifest = read_manifest(tmp_path)
    assert (manifest.plan, manifest.complete, len(manifest.parts)) == (PLAN, True, 3)
    parts = list(read_parts(tmp_path, manifest))
    assert [part.ids for part in parts] == [[f"{n}-0", f"{n}-1"] for n in range(3)]
    assert parts[1].vectors.tolist() == rows(1).tolist()


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_output__ended_at_any_call_leaves_whole_parts_and_goes_on(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the nth call, for every n, and leave what is unfinished lying as a kill would."""
    whole(tmp_path / "reference")
    reference = contents(tmp_path / "reference")
    real = getattr(os, call)

    def ends_at(last: int, directory: Path) -> bool:
        """Write until the call of that number; False where there were fewer."""
        calls = 0

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > last:
                raise _Killed
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing)
            patched.setattr(Output, "_remove_unfinished", lambda self: None)
            try:
                whole(directory)
            except _Killed:
                return True
        return False

    ended = 0
    while ends_at(ended, directory := tmp_path / f"out-{ended}"):
        if (directory / MANIFEST).exists():
            list(read_parts(directory, read_manifest(directory)))  # each is verified
        for path in directory.glob("part-*.npy"):
            assert len(np.load(path)) == 2
        whole(directory)
        assert contents(directory) == reference
        ended += 1
    assert ended >= 11  # each of seven files of parts, four manifests


def test_missing__are_those_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    with Output(tmp_path, PLAN) as output:
        assert output.missing() == [0, 1, 2]
        write(output, 1)
        assert output.missing() == [0, 2]
        assert output.counts == (2, 1)
    assert not read_manifest(tmp_path).complete
    with Output(tmp_path, PLAN) as output:
        assert output.missing() == [0, 2]


def test_part__that_is_damaged_is_made_again_and_named(tmp_path: Path) -> None:
    whole(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "part-00001.npy").write_bytes(before["part-00001.npy"][:-1] + b"x")
    (tmp_path / "part-00002.parquet").unlink()
    with pytest.raises(OutputError, match=r"part-00001.npy is damaged"):
        list(read_parts(tmp_path, read_manifest(tmp_path)))
    with Output(tmp_path, PLAN) as output:
        assert output.missing() == [1, 2]
        assert [text.partition(": ")[0].rpartition("/")[2] for text in output.damaged] == [
            "part-00001.npy is damaged",
            "part-00002.parquet cannot be read",
        ]
    whole(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "n" * 64}, "was begun with model_id mmm.* not nnn"),
        ({"vectors": "features"}, "vectors embedding, not features"),
        ({"precision": "int8"}, "precision fp32, not int8"),
        ({"source": "parquet"}, "source folder, not parquet"),
        ({"partition_images": 3}, "partition_images 2, not 3"),
        ({"images": 5}, "the source has 5 images, .* was begun with 6"),
        ({"fingerprints": ("f0", "x", "f2")}, "images 2 to 3 of the source have changed"),
    ],
)
def test_output__of_another_run_is_refused_and_left_alone(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    whole(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=message):
        Output(tmp_path, replace(PLAN, **change))
    assert contents(tmp_path) == before
    whole(tmp_path)  # the lock is free again


def test_output__in_use_or_with_other_things_is_refused(tmp_path: Path) -> None:
    with Output(tmp_path, PLAN), pytest.raises(OutputError, match="another process writes"):
        Output(tmp_path, PLAN)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OutputError, match=r"holds thesis\.txt and no manifest"):
        Output(tmp_path, PLAN)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is missing: wanted a directory that python -m service.embed"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: path.write_text('{"schema": "x/2"}'), "has schema 'x/2'"),
        (
            lambda path: path.write_text(path.read_text().replace('"dim"', '"dims"')),
            "cannot be read",
        ),
    ],
)
def test_manifest__that_is_none_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    whole(tmp_path)
    spoil(tmp_path / MANIFEST)
    with pytest.raises(OutputError, match=message):
        read_manifest(tmp_path)


def test_part__of_other_rows_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    whole(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    values["plan"]["dim"] = 5
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(OutputError, match=r"float32 \(2, 4\) for 2 ids, wanted float32 with 5"):
        list(read_parts(tmp_path, read_manifest(tmp_path)))
