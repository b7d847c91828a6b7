"""service.backup and service.restore: what comes back is what was there, or nothing comes."""

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service import backup as backup_module
from service import restore as restore_module
from service.backup import CopyError, backup
from service.gallery.database import FILE_NAME
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Gallery, GalleryError, Idempotency, Item
from service.restore import restore
from trainer.representation.artifact import MANIFEST, ArtifactError
from trainer.representation.bundle import Bundle

WAIT_S = 30
KEY = Idempotency("key", "digest")


def known(gallery: Gallery) -> dict[str, Any]:
    """Everything that must come back."""
    snapshot = gallery.snapshot()
    rows = snapshot.rows()
    items = [snapshot.item(int(row)) for row in rows]
    return {
        "version": snapshot.version,
        "items": [(i.id, i.vector.tobytes(), i.metadata) for i in items],
        "seqs": snapshot.seqs(rows).tolist(),
        "pictures": [
            (gallery.picture(i.id, "thumbnail"), gallery.picture(i.id, "original")) for i in items
        ],
        "answer": gallery.recall(KEY),
    }


@pytest.fixture
def gallery(
    bundle: Bundle, tmp_path: Path, random_units: Callable[..., NDArray[np.float32]]
) -> Iterator[LoggedGallery]:
    gallery = LoggedGallery(tmp_path / "state", bundle)
    vectors = random_units(6, 12, 1)
    for n, vector in enumerate(vectors):
        item = Item(f"ü/{n}", vector, {"n": n}, b"thumbnail %d" % (n // 2), b"original %d" % n)
        gallery.apply(Change(upserts=[item])).result(WAIT_S)
    gallery.apply(Change(deletes=["ü/3", "train/0001.png"], idempotency=KEY)).result(WAIT_S)
    yield gallery
    gallery.close()


def reopened(state: Path, bundle: Bundle) -> dict[str, Any]:
    gallery = LoggedGallery(state, bundle)
    try:
        return known(gallery)
    finally:
        gallery.close()


def test_backup__of_a_gallery_in_use_comes_back_equal(
    gallery: LoggedGallery,
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = known(gallery)
    assert wanted["answer"] is not None
    target, state = tmp_path / "copies" / "one", tmp_path / "restored"
    arguments = ["--state", str(tmp_path / "state"), "--to", str(target)]
    with monkeypatch.context() as other:
        other.setenv("INVPROP_GALLERY", "milvus://127.0.0.1:19530/photos")
        assert backup_module.main(arguments) == 1
    assert "is backed up with Milvus' own tools" in capsys.readouterr().err
    assert backup_module.main(arguments) == 0
    assert "44 items after 48 operations" in capsys.readouterr().out
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, FILE_NAME]
    assert [path.name for path in target.parent.iterdir()] == ["one"]
    gallery.apply(Change(deletes=["ü/0"])).result(WAIT_S)  # after the backup
    assert restore_module.main(["--from", str(target), "--state", str(state)]) == 0
    assert reopened(state, bundle) == wanted


def test_backup__while_it_is_written_to_is_a_state_that_was_answered(
    gallery: LoggedGallery,
    bundle: Bundle,
    tmp_path: Path,
    random_units: Callable[..., NDArray[np.float32]],
) -> None:
    vectors, ends, answered = random_units(40, 12, 2), threading.Event(), [48]
    failures: list[BaseException] = []

    def write() -> None:
        n = 0
        try:
            while not ends.is_set():  # five items a change: a torn one would show
                items = [Item(f"w/{n}/{i}", vectors[i], {"n": n}) for i in range(5)]
                answered.append(gallery.apply(Change(upserts=items)).result(WAIT_S).gallery_version)
                n += 1
        except BaseException as error:  # noqa: BLE001 - a thread's door: raised again below
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(2):
            least = answered[-1]
            backup(tmp_path / "state", None, tmp_path / f"copy-{number}")
            restore(tmp_path / f"copy-{number}", tmp_path / f"restored-{number}", None)
            version = reopened(tmp_path / f"restored-{number}", bundle)["version"]
            assert version >= least
            assert (version - 48) % 5 == 0
    finally:
        ends.set()
        thread.join()
    assert not failures


def test_backup__is_never_written_over(gallery: LoggedGallery, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CopyError, match="exists: a backup is never written over"):
        backup(tmp_path / "state", None, tmp_path / "there")


def test_backup__of_nothing_or_of_what_is_damaged(
    gallery: LoggedGallery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GalleryError, match="there is no gallery in"):
        backup(tmp_path / "none", None, tmp_path / "copy")
    connection = sqlite3.connect(tmp_path / "state" / FILE_NAME)
    with connection:
        connection.execute("UPDATE operations SET metadata = x'7b7d' WHERE seq = 42")
    connection.close()
    words = ["--state", str(tmp_path / "state"), "--to", str(tmp_path / "copy")]
    assert backup_module.main(words) == 1
    assert "seq 42: it does not match its checksum" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.fixture
def copy(gallery: LoggedGallery, tmp_path: Path) -> Path:
    """A backup."""
    backup(tmp_path / "state", None, tmp_path / "copy")
    return tmp_path / "copy"


def test_restore__refuses_a_target_that_is_not_empty(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CopyError, match="is not empty"):
        restore(copy, tmp_path / "full", None)
    with pytest.raises(CopyError, match="is not empty"):
        restore(copy, tmp_path / "full" / "file", None)
    (tmp_path / "empty").mkdir()
    assert restore(copy, tmp_path / "empty", None).galleries[0].items == 44


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda copy: _flip(copy / FILE_NAME), "is damaged or was replaced"),
        (lambda copy: (copy / FILE_NAME).write_bytes(b""), "has 0 bytes"),
        (lambda copy: (copy / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda copy: (copy / MANIFEST).write_text('{"files": {}}'), "is no backup"),
        (lambda copy: (copy / f"{FILE_NAME}-journal").touch(), "which is no part of it"),
    ],
)
def test_restore__of_a_damaged_backup_writes_nothing(
    copy: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(copy)
    with pytest.raises((ArtifactError, CopyError), match=named):
        restore(copy, tmp_path / "restored", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "state"]


CALLS = ("write", "fsync", "rename", "mkdir")


class Faults:
    """Lets the n-th call that changes the disk fail, as a disk does."""

    def __init__(self, fails_at: int, code: int) -> None:
        self.calls: list[str] = []
        self._fails_at, self._code = fails_at, code

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(shutil, "copyfile", self._counted("copyfile", shutil.copyfile))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "mkdir" and Path(arguments[0]).exists():  # nothing is changed
                return real(*arguments, **named)
            self.calls.append(name)
            if len(self.calls) - 1 == self._fails_at:
                raise OSError(self._code, os.strerror(self._code))
            return real(*arguments, **named)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_error__of_any_call_is_told_and_leaves_nothing(
    copy: Path, tmp_path: Path, code: int
) -> None:
    failed: set[str] = set()
    for name, do in (
        ("backup", lambda target: backup(tmp_path / "state", None, target)),
        ("restore", lambda target: restore(copy, target, None)),
    ):
        for fails_at in range(100):  # until no fault fires
            target = tmp_path / "targets" / f"{name}-{fails_at}"
            target.parent.mkdir(exist_ok=True)
            faults = Faults(fails_at, code)
            with pytest.MonkeyPatch.context() as patch:
                faults.install(patch)
                code_seen = _error_of(do, target)
            if code_seen is not None:
                assert code_seen == code
                failed.add(faults.calls[fails_at])
                assert not any(target.parent.iterdir()), (name, faults.calls)
                continue
            assert len(faults.calls) <= fails_at, f"{faults.calls} failed and nothing was said"
            assert fails_at > 2
            shutil.rmtree(target)
            break
    assert failed >= {"write", "fsync", "rename", "mkdir", "copyfile"}


def _error_of(do: Callable[[Path], object], target: Path) -> int | None:
    try:
        do(target)
    except OSError as error:
        return error.errno
    return None
