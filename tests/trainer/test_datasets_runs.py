"""Every kind of source trains as the folder of the same pictures does, stopped and resumed too.

And is refused once it has changed.

Run: pytest tests/trainer/test_datasets_runs.py
"""

import io
import json
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from trainer import step as module
from trainer.datasets import open_source
from trainer.objective import Objective
from trainer.representation.bundle import open_bundle
from trainer.representation.preprocess import InputContract
from trainer.run import main

from .conftest import TINY

# 24 pictures, 8 in a batch: 3 steps an epoch. Nothing is held: each batch is read from its files.
WORDS = (*TINY, "data.holdout=0", "data.workers=0", "data.resident_limit_bytes=0")
Pictures = list[np.ndarray]  # (h, w) or (h, w, 3)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _as_folder(pictures: Pictures, target: Path) -> str:
    for i, picture in enumerate(pictures):
        (target / "folder").mkdir(exist_ok=True, parents=True)
        (target / "folder" / f"{i:03d}.png").write_bytes(_png(picture))
    return str(target / "folder")


def _as_list(pictures: Pictures, target: Path) -> str:
    folder = Path(_as_folder(pictures, target))
    names = [f"folder/{i:03d}.png" for i in range(len(pictures))]
    (folder.parent / "list.txt").write_text("\n".join(names))
    return str(folder.parent / "list.txt")


def _as_npz(pictures: Pictures, target: Path) -> str:
    shapes = np.array([picture.shape for picture in pictures])
    pixels = np.concatenate([picture.ravel() for picture in pictures])
    np.savez(target / "x.npz", pixels=pixels, shapes=shapes)
    return str(target / "x.npz")


def _as_tars(pictures: Pictures, target: Path) -> str:
    for shard, first in enumerate(range(0, len(pictures), 10)):
        with tarfile.open(target / f"x-{shard}.tar", "w") as archive:
            for i, picture in enumerate(pictures[first : first + 10], first):
                info, content = tarfile.TarInfo(f"{i:03d}.png"), _png(picture)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(target / "x-{0..2}.tar")


def _as_parquet(pictures: Pictures, target: Path) -> str:
    table = pyarrow.table({"image": [_png(picture) for picture in pictures]})
    parquet.write_table(table, target / "x.parquet", row_group_size=8)
    return str(target / "x.parquet")


def _as_saved_dataset(pictures: Pictures, target: Path) -> str:
    root = target / "saved"
    root.mkdir(exist_ok=True)
    table = pyarrow.table({"image": [_png(picture) for picture in pictures]})
    with pyarrow.ipc.new_stream(str(root / "data.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return str(root)


def _as_torchvision_set(pictures: Pictures, target: Path) -> str:
    for i, picture in enumerate(pictures):  # two classes; labels change neither order nor views
        place = target / "eurosat" / "2750" / ("Forest" if i < 12 else "River")
        place.mkdir(exist_ok=True, parents=True)
        (place / f"{i:03d}.png").write_bytes(_png(picture))
    return f"eurosat:{target}"


KINDS: list[Callable[[Pictures, Path], str]] = [
    _as_folder,
    _as_list,
    _as_npz,
    _as_tars,
    _as_parquet,
    _as_saved_dataset,
    _as_torchvision_set,
]
each_kind = pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__[4:])


def _wafers(count: int = 24) -> Pictures:
    """Grey pictures of several sizes with few values."""
    draw = np.random.default_rng(0)
    sizes = [(12 + i % 3, 12 + i % 5) for i in range(count)]
    return [draw.choice(np.array([0, 128, 255], np.uint8), size) for size in sizes]


def _outcome(output: Path) -> tuple[list[dict[str, Any]], Any]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    figures = [
        {name: line[name] for name in ("loss", "reached", "spread")}
        for line in lines
        if line["epoch"]
    ]
    return figures, open_bundle(output / "bundle").manifest["files"]["encoder.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a folder that nothing interrupted."""
    place = tmp_path_factory.mktemp("whole")
    line = ["digits", "--data", _as_folder(_wafers(), place), "--output", str(place / "run")]
    assert main([*line, *WORDS]) == 0
    return place / "run"


@each_kind
def test_run__stopped_within_an_epoch_is_the_run_on_the_folder(
    write: Callable[[Pictures, Path], str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = module.objective, []

    def interrupted(*arguments: Any, **named: Any) -> Objective:
        calls.append(1)
        if len(calls) == 4:  # the first step of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    data = write(_wafers(), tmp_path)
    line = ["digits", "--data", data, "--output", str(tmp_path / "run"), *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr(module, "objective", interrupted)
        assert main(line) == 128 + signal.SIGTERM
    assert main([*line, "--resume"]) == 0
    assert "going on from epoch-0002-step-000001" in capsys.readouterr().out
    assert _outcome(tmp_path / "run") == _outcome(whole)


@each_kind
def test_resume__of_a_source_that_has_changed(
    write: Callable[[Pictures, Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, output = _wafers(), tmp_path / "run"
    line = ["digits", "--data", write(pictures, tmp_path), "--output", str(output), *WORDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.session.export_bundle", _killed)
        assert main([*line, "epochs=1"]) == 1
    write([*pictures[1:], pictures[0]], tmp_path)
    before = (output / "report.json").read_bytes()
    assert main([*line, "epochs=1", "--resume"]) == 2
    assert "was begun with other images" in capsys.readouterr().err
    assert (output / "report.json").read_bytes() == before


def _killed(*arguments: Any, **named: Any) -> None:
    raise OSError("as if it had been killed before the export")


@each_kind
@pytest.mark.parametrize("bits", [8, 16])
def test_grey__is_the_same_in_every_kind(
    write: Callable[[Pictures, Path], str], tmp_path: Path, bits: int
) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    # 257 is 65535 / 255: 16 bits that stand for the same greys.
    picture = ramp if bits == 8 else ramp.astype(np.uint16) * 257
    if bits == 16 and write is _as_npz:
        path = write([picture], tmp_path)
        with pytest.raises(ValueError, match=r"`pixels` is uint16 .* scale other ranges to 0\.\."):
            open_source(path)
        return
    made = open_source(write([picture] * 24, tmp_path)).prepared([0], InputContract(size_px=16))
    assert (made[0] == ramp[:, :, None]).all()
