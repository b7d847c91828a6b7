"""service.embed: the vectors are those of /embed, whatever the source, in one go or resumed."""

import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from service import embed
from service.bulk.embedding import BulkEmbedder
from service.bulk.parts import Output, Part, read_manifest, read_parts
from tests.service.bulk.conftest import BROKEN, GOOD
from tests.service.conftest import DIM, FEATURES, Service

Run = Callable[..., int]


@pytest.fixture
def run(photos: Path, bundle_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(output, *flags, source=..., bundle=...) -> the exit code of service.embed."""
    monkeypatch.setenv("INVPROP_DECODER_PROCESSES", "1")
    monkeypatch.setenv("INVPROP_MAX_BATCH", "4")

    def _run(output: Path, *flags: str, source: Path = photos, **named: Path) -> int:
        bundle = named.get("bundle", bundle_directory)
        given = [str(source), "--bundle", str(bundle), "--output", str(output)]
        return embed.main([*given, "--partition-images", "10", *flags])

    return _run


def parts(directory: Path) -> list[Part]:
    return list(read_parts(directory, read_manifest(directory)))


def vectors(directory: Path) -> dict[str, bytes]:
    return {
        name: row.tobytes()
        for part in parts(directory)
        for name, row in zip(part.ids, part.vectors, strict=True)
    }


def test_embed__gives_what_the_service_gives(
    tmp_path: Path,
    photos: Path,
    run: Run,
    shared_service: Service,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "out") == 0
    assert (
        f"{GOOD} vectors of {DIM} in 3 parts, {BROKEN} images rejected" in capsys.readouterr().out
    )
    found = parts(tmp_path / "out")
    assert sum(len(part.ids) for part in found) == GOOD
    for part in found:
        files = [("images", (name, (photos / name).read_bytes())) for name in part.ids]
        answer = shared_service.client.post(
            "/embed", files=files, headers={"Accept": "application/x-npy"}
        )
        served = np.load(io.BytesIO(answer.content))
        np.testing.assert_allclose(part.vectors, served, atol=1e-6)
    told = parquet.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    for row in told:
        refused = shared_service.client.post(
            "/embed", files=[("images", (row["id"], (photos / row["id"]).read_bytes()))]
        )
        assert refused.json()["errors"][0]["reason"] == row["reason"]
    assert [row["id"] for row in told] == ["0/cut.png", "1/old.bmp"]


def test_embed__features(tmp_path: Path, run: Run) -> None:
    assert run(tmp_path, "--vectors", "features") == 0
    assert parts(tmp_path)[0].vectors.shape == (10, FEATURES)
    assert read_manifest(tmp_path).plan.vectors == "features"


def test_embed__of_a_table_gives_the_same_vectors(tmp_path: Path, photos: Path, run: Run) -> None:
    assert run(tmp_path / "folder") == 0
    found = vectors(tmp_path / "folder")
    table = tmp_path / "table.parquet"
    parquet.write_table(
        pyarrow.table({"image": [(photos / name).read_bytes() for name in found]}), table
    )
    assert run(tmp_path / "table", source=table) == 0
    same = vectors(tmp_path / "table")
    assert list(same) == [f"table.parquet/{n:02d}" for n in range(GOOD)]
    for one, other in zip(found.values(), same.values(), strict=True):
        np.testing.assert_allclose(
            np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), atol=1e-6
        )


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_embed__that_was_stopped_goes_on_with_what_is_missing(
    raised: BaseException,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "reference") == 0
    real, written = Output.write, []

    def stopping(self: Output, number: int, *arguments: Any) -> None:
        if number == 1 and raised not in written:
            written.append(raised)
            raise raised
        written.append(number)
        real(self, number, *arguments)

    monkeypatch.setattr(Output, "write", stopping)
    code = run(tmp_path / "out")
    told = capsys.readouterr().err
    if isinstance(raised, OSError):
        assert (code, "No space left" in told, "run it again" in told) == (1, True, True)
    else:
        assert (code, "interrupted; run it again" in told) == (130, True)
    assert [part.name for part in parts(tmp_path / "out")] == ["part-00000"]
    assert not read_manifest(tmp_path / "out").complete
    assert run(tmp_path / "out") == 0
    assert written == [0, raised, 1, 2]
    for path in (tmp_path / "reference").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert run(tmp_path / "out") == 0  # nothing is left to do
    assert written == [0, raised, 1, 2]


def test_embed__ended_by_sigterm_cleans_up(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BulkEmbedder.embed

    def slow(self: BulkEmbedder, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(BulkEmbedder, "embed", slow)
    before, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    assert run(tmp_path) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert set(threading.enumerate()) <= threads
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition-images", "0"], "--partition-images is 0"),
        (["--precision", "int4"], "precision: Input should be"),
        (["--partition-images", "7"], "was begun with partition_images 10, not 7"),
        (["--vectors", "features"], "was begun with vectors embedding, not features"),
    ],
)
def test_embed__wrong_use_is_said(
    flags: list[str], message: str, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_embed__of_no_source_no_bundle_or_a_precision_that_is_not_there(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", source=tmp_path / "none") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(tmp_path / "out", bundle=tmp_path) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert run(tmp_path / "out", "--precision", "int8") == 2
    assert "precision = int8 was asked for" in capsys.readouterr().err


def test_embed__of_another_model_into_the_same_output_is_refused(
    tmp_path: Path,
    run: Run,
    make_bundle: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "out") == 0
    other = make_bundle(tmp_path / "other", seed=5)
    assert run(tmp_path / "out", bundle=other) == 2
    assert "was begun with model_id" in capsys.readouterr().err
