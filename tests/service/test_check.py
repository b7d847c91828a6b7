"""service.check: what is sound is called so, and every damage has a name and an exit code."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.check import main
from service.gallery.database import FILE_NAME
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Idempotency, Item
from trainer.representation.artifact import write_artifact
from trainer.representation.bundle import Bundle, open_bundle

WAIT_S = 30


@pytest.fixture(scope="module")
def sound(
    bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
    random_units: Callable[..., NDArray[np.float32]],
) -> Path:
    """A state with items that were replaced and deleted, pictures and a kept answer."""
    state = tmp_path_factory.mktemp("sound") / "state"
    gallery = LoggedGallery(state, bundle)
    a, b, c = random_units(3, 12, 1)
    for change in (
        Change(upserts=[Item("a", a, {"n": 1}, b"thumbnail of a", b"a")]),
        Change(upserts=[Item("b", b, {}, b"thumbnail of b"), Item("c", c, {}, b"of c")]),
        Change(upserts=[Item("b", c, {"n": 2}, b"another one of b")]),
        Change(deletes=["c"], idempotency=Idempotency("key", "digest")),
    ):
        gallery.apply(change).result(WAIT_S)
    gallery.close()
    return state


@pytest.fixture
def state(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "state"))


def change(state: Path, statement: str, *values: object) -> None:
    """Damage the file as no program of ours would."""
    connection = sqlite3.connect(state / FILE_NAME)
    with connection:
        connection.execute(statement, values)
    connection.close()


def test_check__of_a_sound_state(
    state: Path, bundle_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--state", str(state), "--bundle", str(bundle_directory)]) == 0
    said = capsys.readouterr().out
    assert "gallery 1, active: 42 items after 45 operations, 2 with a picture, 1 kept" in said
    assert "3 pictures" in said
    assert said.endswith("sound\n")


def test_check__for_programs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(state, "DELETE FROM operations WHERE seq = 41")
    assert main(["--state", str(state), "--json"]) == 1
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["sound"] is False
    assert report["galleries"][0]["items"] == 41
    assert any("seq 41: it is missing" in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE operations SET vector = zeroblob(48) WHERE seq = 2", "seq 2: it does not match"),
        ("UPDATE operations SET vector = 'text' WHERE seq = 2", "seq 2: "),
        ("UPDATE operations SET kind = 'delete' WHERE seq = 2", "seq 2: it does not match"),
        ("UPDATE operations SET crc32 = crc32 + 1 WHERE seq = 3", "seq 3: it does not match"),
        ("UPDATE operations SET seq = 'text' WHERE seq = 45", "seq 45: its number reads 'text'"),
        ("DELETE FROM operations WHERE seq = 45", "counts 45 operations, the last is 44"),
        ("DELETE FROM operations WHERE seq = 7", "seq 7: it is missing, 8 is next"),
        ("UPDATE operations SET gallery = 2 WHERE seq = 45", "operations: 1 rows of no gallery"),
        ("UPDATE galleries SET last_seq = 44", "table galleries, id 1"),
        ("UPDATE galleries SET state = 'retired'", "table galleries, id 1"),
        ("UPDATE idempotency SET answer = x'00'", "key 'key': not as its checksum says"),
        ("UPDATE idempotency SET answer = 5", "key 'key': not as its checksum says"),
        ("UPDATE idempotency SET gallery = 2", "idempotency: 1 rows of no gallery"),
        ("UPDATE pictures SET content = x'00' WHERE content = x'61'", "does not match its hash"),
        ("DELETE FROM pictures WHERE content = x'61'", "it is missing"),
        ("INSERT INTO pictures VALUES (x'ff', x'00')", "no item holds it"),
        ("DELETE FROM held WHERE seq = 41", "table held, seq 41"),
        ("INSERT INTO held VALUES (1, 3, x'ff', NULL)", "table held, seq 3"),
        ("UPDATE held SET original = NULL", "table held, seq 41"),
        ("UPDATE database SET schema = 'else'", "got ['else']"),
        ("DROP TABLE held", "no table held"),
    ],
)
def test_check__names_what_is_wrong(
    state: Path, statement: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(state, statement)
    assert main(["--state", str(state)]) == 1
    said = capsys.readouterr().out
    assert any(named in line for line in said.splitlines() if line.startswith("DAMAGED")), said


def test_check__tells_of_many_problems_the_first(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(state, "UPDATE operations SET crc32 = 0")
    assert main(["--state", str(state)]) == 1
    said = capsys.readouterr().out
    assert "seq 20: " in said
    assert "seq 21: " not in said
    assert "more like the 20 before: operations" in said


def test_check__of_a_file_that_is_no_database(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (state / FILE_NAME).write_bytes(b"no database at all" * 1000)
    assert main(["--state", str(state)]) == 1
    assert f"DAMAGED: {state / FILE_NAME}: " in capsys.readouterr().out


def test_check__of_another_bundle(
    state: Path,
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_bundle(tmp_path / "other", seed=5)
    assert main(["--state", str(state), "--bundle", str(other)]) == 1
    assert f"{other} is model {open_bundle(other).model_id[:12]}" in capsys.readouterr().out
    (other / "encoder.onnx").write_bytes(b"")
    assert main(["--state", str(state), "--bundle", str(other)]) == 1
    assert "encoder.onnx has 0 bytes" in capsys.readouterr().out


def test_check__of_snapshots(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(state / FILE_NAME)
    ((log_id,),) = connection.execute("SELECT log_id FROM galleries")
    ((crc32,),) = connection.execute("SELECT crc32 FROM operations WHERE seq = 40")
    connection.close()

    def write(seq: int, log: str, operation: int) -> Path:
        origin = {"log_id": log, "seq": seq, "operation": operation}
        path = state / "generations" / log_id / f"gen-{seq:012d}"
        write_artifact(path, {"facts.json": json.dumps({"origin": origin}).encode()}, {})
        return path

    shutil.rmtree(state / "generations")  # which the service wrote
    path = write(40, log_id, crc32)
    assert main(["--state", str(state)]) == 0
    assert "1 snapshots on disk" in capsys.readouterr().out
    for strange, named in (
        ((40, log_id, crc32 + 1), "operation 40 of the log is another one"),
        ((40, "other", crc32), "of a log that is not there"),
        ((99, log_id, crc32), "operation 99 of the log is another one"),
    ):
        shutil.rmtree(path.parent)
        path = write(*strange)
        assert main(["--state", str(state)]) == 1
        assert named in capsys.readouterr().out
    (path / "facts.json").write_bytes(b"{}")
    assert main(["--state", str(state)]) == 1
    assert "facts.json has 2 bytes" in capsys.readouterr().out


def test_check__that_cannot_be_made(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--state", str(tmp_path / "none")]) == 2
    assert "error: there is no gallery in" in capsys.readouterr().err
    gallery = LoggedGallery(tmp_path / "state", bundle)
    assert main(["--state", str(tmp_path / "state")]) == 2
    assert "is in use by process" in capsys.readouterr().err
    gallery.close()
    assert main(["--state", str(tmp_path / "state")]) == 0
    left = sorted(p.name for p in (tmp_path / "state").iterdir())
    # Nothing but what the service wrote.
    assert left == ["begun", "generations", "lock", FILE_NAME]
