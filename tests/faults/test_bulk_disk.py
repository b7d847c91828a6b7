"""Bulk embedding and loading on a disk that is full: said, nothing half written, gone on with.

Run: pytest tests/faults/test_bulk_disk.py
"""

from pathlib import Path

import pytest

from service import embed, load
from service.bulk.parts import read_manifest, read_parts
from service.check import check
from service.gallery.database import Database
from tests.service.conftest import build_bundle, encoded

IMAGES, PARTITION, BUNDLED = 40, 4, 6


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A bundle and a folder of pictures."""
    monkeypatch.setenv("INVPROP_DECODER_PROCESSES", "1")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(IMAGES):
        (photos / f"{i:02d}.png").write_bytes(encoded(i))
    return build_bundle(tmp_path / "bundle", images=BUNDLED), photos


def fill(disk: Path, leave_bytes: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(file.tell() - leave_bytes)
    return ballast


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_embed__on_a_full_disk_keeps_whole_parts_and_goes_on(
    small_disk: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, photos = made
    output = small_disk / "out"
    ballast = fill(small_disk, 48 * 1024)
    arguments = [str(photos), "--bundle", str(bundle), "--output", str(output)]
    arguments += ["--partition-images", str(PARTITION)]
    assert embed.main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    manifest = read_manifest(output)
    whole = len(list(read_parts(output, manifest)))
    assert 0 < whole < IMAGES / PARTITION
    assert not list(output.glob(".*"))
    ballast.unlink()
    assert embed.main(arguments) == 0
    assert f"{IMAGES} vectors" in capsys.readouterr().out


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_load__on_a_full_disk_says_so_and_goes_on(
    small_disk: Path,
    made: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, photos = made
    output, state = tmp_path / "out", small_disk / "state"
    arguments = [str(photos), "--bundle", str(bundle), "--output", str(output)]
    assert embed.main([*arguments, "--partition-images", str(PARTITION)]) == 0
    arguments = [str(output), "--bundle", str(bundle), "--state", str(state)]
    Database(state).close()  # tables and nothing else
    ballast = fill(small_disk, 8 * 1024)
    capsys.readouterr()
    assert load.main(arguments) == 1
    assert "full" in capsys.readouterr().err
    ballast.unlink()
    assert load.main(arguments) == 0
    database = Database(state, make=False)
    report = check(database)
    database.close()  # else the file system cannot be unmounted
    assert report.is_sound, report.problems
    assert report.galleries[0].items == IMAGES + BUNDLED
