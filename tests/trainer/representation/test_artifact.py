import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.representation import artifact
from trainer.representation.artifact import (
    ArtifactError,
    open_artifact,
    remove_unfinished,
    write_artifact,
)

FILES = {
    "weights.bin": np.random.default_rng(0).bytes(5_000),
    "deep/er/ids.json": b'["a", "b"]',
    "empty": b"",
}


def written(directory: Path, facts: dict[str, object] | None = None) -> Path:
    write_artifact(directory, FILES, facts or {"schema": "test/1"})
    return directory


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_artifact__is_what_was_written(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "artifact"
    stated = write_artifact(directory, FILES, {"schema": "test/1", "step": 7})
    assert open_artifact(directory) == stated
    assert (stated["schema"], stated["step"]) == ("test/1", 7)
    assert stated["files"]["deep/er/ids.json"]["size_bytes"] == 10
    # Known from elsewhere: the sha256 of nothing.
    assert stated["files"]["empty"]["sha256"].startswith("e3b0c44298fc1c149afbf4c8996fb924")
    for name, content in FILES.items():
        assert (directory / name).read_bytes() == content
    assert [path.name for path in directory.parent.iterdir()] == ["artifact"]


def test_write__replaces_an_older_artifact_whole(tmp_path: Path) -> None:
    directory = written(tmp_path / "artifact")
    write_artifact(directory, {"other": b"1"}, {"step": 2})
    assert open_artifact(directory)["step"] == 2
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_write__does_not_replace_what_is_no_artifact(tmp_path: Path, what: str) -> None:
    target = tmp_path / "holiday"
    if what == "folder":
        target.mkdir()
        (target / "photo.jpg").write_text("dear")
    else:
        target.write_text("dear")
    with pytest.raises(ArtifactError, match=r"holiday exists and has no manifest\.json"):
        written(target)
    kept = target / "photo.jpg" if what == "folder" else target
    assert kept.read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["holiday"]


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_open__any_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "artifact") / name
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 10).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"{path} is damaged or was replaced"):
            open_artifact(tmp_path / "artifact")
    path.write_bytes(content)
    open_artifact(tmp_path / "artifact")


@pytest.mark.parametrize("name", FILES)
def test_open__another_length_is_found(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "artifact") / name
    content = path.read_bytes()
    for other in {content[:-1], content[: len(content) // 2], b"", content + b"\0"} - {content}:
        path.write_bytes(other)
        with pytest.raises(ArtifactError, match=rf"{path} has {len(other)} bytes, its manifest"):
            open_artifact(tmp_path / "artifact")


def test_open__missing_file(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact") / "deep" / "er" / "ids.json"
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{path} cannot be read: No such file"):
        open_artifact(tmp_path / "artifact")


def test_open__no_manifest(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
            open_artifact(directory)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"{}", b'{"files": []}', b"\xff\xfe", b"\0" * 64]
)
def test_open__manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    (written(tmp_path / "artifact") / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json (cannot be read|lists no files)"):
        open_artifact(tmp_path / "artifact")


@pytest.mark.parametrize("name", ["../secret", "deep/../../secret", "/etc/hostname", "", ".."])
def test_open__manifest_that_leads_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    directory = written(tmp_path / "artifact")
    entries = artifact.file_entries({name: b""})
    edit_manifest(directory, files=entries)
    with pytest.raises(ArtifactError, match="lies outside"):
        open_artifact(directory)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_open__manifest_with_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    directory = written(tmp_path / "artifact")
    edit_manifest(directory, files=artifact.file_entries({name: b""}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(directory)


@pytest.mark.parametrize("entry", [None, {}, {"sha256": "0"}, {"size_bytes": 0}, "0"])
def test_open__manifest_without_hashes(tmp_path: Path, entry: object) -> None:
    directory = written(tmp_path / "artifact")
    edit_manifest(directory, files={"empty": entry})
    with pytest.raises(ArtifactError, match="no sha256 and size_bytes for 'empty'"):
        open_artifact(directory)


def _count_calls(name: str, monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> list[int]:
    """Count the calls of os.<name> and let one of them fail as a full disk does."""
    calls: list[int] = []
    original = getattr(os, name)

    def counted(*arguments: object, **keywords: object) -> object:
        calls.append(len(calls))
        if calls[-1] == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **keywords)

    monkeypatch.setattr(os, name, counted)
    return calls


@pytest.mark.parametrize("name", ["fsync", "rename"])
@pytest.mark.parametrize("older", [True, False])
def test_write__failure_at_any_point_changes_nothing(
    tmp_path: Path, name: str, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(directory: Path, fail_at: int | None) -> int:
        directory.parent.mkdir()
        if older:
            written(directory, {"age": "old"})
        with monkeypatch.context() as patch:
            calls = _count_calls(name, patch, fail_at)
            if fail_at is None:
                written(directory, {"age": "new"})
            else:
                with pytest.raises(OSError, match="No space left"):
                    written(directory, {"age": "new"})
        return len(calls)

    total = attempt(tmp_path / "whole" / "artifact", None)
    assert total >= 1  # the call that is made to fail is really made
    for fail_at in range(total):
        directory = tmp_path / f"fails-{fail_at}" / "artifact"
        attempt(directory, fail_at)
        left = [path.name for path in directory.parent.iterdir()]
        assert left == (["artifact"] if older else []), f"{name} call {fail_at}"
        if older:
            assert open_artifact(directory)["age"] == "old"


def test_write__disk_limit_reached_within_a_file(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from trainer.representation.artifact import write_artifact\n"
        "write_artifact(sys.argv[1], {'small': b'1'}, {'age': 'old'})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_artifact(sys.argv[1], {'small': b'2', 'large': bytes(10_000)}, {'age': 'new'})\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    directory = tmp_path / "artifact"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        env={**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == os.strerror(errno.EFBIG)
    assert open_artifact(directory)["age"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


REWRITER = """
import sys
from trainer.representation.artifact import write_artifact
age = 0
while True:
    age += 1
    content = str(age).encode() * 2000
    write_artifact(sys.argv[1], {"one": content, "two": content}, {"age": age})
    print(age, flush=True)
"""


def test_write__killed_while_replacing_leaves_one_whole_artifact(tmp_path: Path) -> None:
    directory, draw, newest = tmp_path / "artifact", random.Random(0), 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", REWRITER, str(directory)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # at least one is acknowledged
            for _ in range(draw.randrange(3)):
                writer.stdout.readline()
            time.sleep(draw.random() * 0.01)  # a moment within the next one
            writer.kill()
            lines = writer.stdout.read().split()
        manifest = open_artifact(directory)
        age = manifest["age"]
        assert (directory / "one").read_bytes() == str(age).encode() * 2000
        newest = int(lines[-1]) if lines else newest
        assert age >= (newest if lines else 1)
    written(directory, {"age": "last"})
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]  # no leftovers


def test_remove_unfinished__takes_nothing_else(tmp_path: Path) -> None:
    litter = [".run.new-0123456789ab", ".run.old-0123456789ab", ".other.new-0123456789ab"]
    kept = ["run", ".run.new-short", "run.new-0123456789ab"]
    for name in litter + kept:
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path, only="run")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, litter[2]])
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
