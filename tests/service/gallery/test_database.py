"""service.gallery.database: a file that lost something is not taken for one without it."""

import sqlite3
from pathlib import Path

import pytest

from service.gallery.database import BEGUN_NAME, FILE_NAME, Database
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import GalleryError
from trainer.representation.bundle import Bundle


@pytest.fixture
def state(bundle: Bundle, tmp_path: Path) -> Path:
    """A state directory that was used."""
    LoggedGallery(tmp_path / "state", bundle).close()
    return tmp_path / "state"


@pytest.mark.parametrize("content", [b"", None])
def test_log__that_is_gone_is_not_begun_anew(
    state: Path, bundle: Bundle, content: bytes | None
) -> None:
    (state / FILE_NAME).unlink()
    if content is not None:
        (state / FILE_NAME).write_bytes(content)
    for _ in range(2):
        with pytest.raises(GalleryError, match="is missing or empty, but begun says"):
            LoggedGallery(state, bundle)
    (state / BEGUN_NAME).unlink()  # as the message says
    gallery = LoggedGallery(state, bundle)
    assert len(gallery.snapshot()) == 40
    gallery.close()


def test_first_start__that_was_cut_short_begins_anew(tmp_path: Path, bundle: Bundle) -> None:
    Database(tmp_path / "state").close()  # tables, no gallery yet
    assert not (tmp_path / "state" / BEGUN_NAME).exists()
    LoggedGallery(tmp_path / "state", bundle).close()
    assert (tmp_path / "state" / BEGUN_NAME).exists()


def test_row__that_the_file_hides_is_missed(state: Path) -> None:
    connection = sqlite3.connect(state / FILE_NAME)
    with connection:
        connection.execute("INSERT INTO idempotency VALUES (1, 'key', 'digest', x'', 0.0, 0)")
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_idempotency_1'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    content = bytearray((state / FILE_NAME).read_bytes())
    content[(root - 1) * size + 3 : (root - 1) * size + 5] = b"\0\0"  # its index knows of no rows
    (state / FILE_NAME).write_bytes(content)
    with pytest.raises(GalleryError, match=r"is damaged: .* Nothing is served from it"):
        Database(state)


def test_reading__makes_nothing(tmp_path: Path, state: Path) -> None:
    with pytest.raises(GalleryError, match="there is no gallery in"):
        Database(tmp_path / "none", make=False)
    assert not (tmp_path / "none").exists()
    before = sorted(state.iterdir())
    owner = Database(state)
    Database(state, make=False).close()  # beside the owner
    owner.close()
    assert sorted(state.iterdir()) == before
