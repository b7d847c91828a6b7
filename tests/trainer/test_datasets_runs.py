"""A whole run on packed pictures: that on the folder, and refused once the set has changed.

Run: pytest tests/trainer/test_datasets_runs.py
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from trainer.representation.bundle import open_bundle
from trainer.run import main

Pictures = Callable[..., Path]


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.png")):
        yield path.name, path.read_bytes()


def _as_tar(folder: Path, target: Path) -> Path:
    with tarfile.open(target / "x.tar", "w") as archive:
        for name, content in _contents(folder):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target / "x.tar"


def _as_parquet(folder: Path, target: Path) -> Path:
    table = pyarrow.table({"image": [content for _, content in _contents(folder)]})
    parquet.write_table(table, target / "x.parquet", row_group_size=8)
    return target / "x.parquet"


@pytest.mark.parametrize("write", [_as_tar, _as_parquet])
def test_run__on_packed_pictures_is_the_run_on_the_folder_and_refuses_others(
    write: Callable[[Path, Path], Path],
    pictures: Pictures,
    tmp_path: Path,
    tiny_overrides: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = pictures(24, nested=False)
    # Nothing is held: every batch is read from the file again.
    words = [*tiny_overrides, "data.workers=0", "data.resident_limit_bytes=0"]

    def run(data: Path, output: str, *more: str) -> int:
        line = ["digits", "--data", str(data), "--output", str(tmp_path / output)]
        return main([*line, *words, *more])

    packed = write(folder, tmp_path)
    assert run(folder, "folder") == 0
    assert run(packed, "packed") == 0
    weights = [
        open_bundle(tmp_path / output / "bundle").manifest["files"]["encoder.safetensors"]
        for output in ("folder", "packed")
    ]
    assert weights[0] == weights[1]
    (tmp_path / "packed" / "report.json").unlink()  # as if it had been killed before the end
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    write(folder, tmp_path)
    assert run(packed, "packed", "--resume") == 2
    assert "was begun with other images" in capsys.readouterr().err
