"""Backups between the engines: from SQLite to PostgreSQL and back, everything stays equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.backup import CopyError, backup
from service.check import main as check_main
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Idempotency, Item
from service.restore import restore
from trainer.representation.bundle import Bundle

WAIT_S = 30
KEY = Idempotency("key", "digest")


def known(state: Path, bundle: Bundle, url: str | None = None) -> dict[str, Any]:
    """Everything that must come back."""
    gallery = LoggedGallery(state, bundle, url=url)
    try:
        snapshot = gallery.snapshot()
        rows = snapshot.rows()
        items = [snapshot.item(int(row)) for row in rows]
        return {
            "version": snapshot.version,
            "items": [(i.id, i.vector.tobytes(), i.metadata) for i in items],
            "seqs": snapshot.seqs(rows).tolist(),
            "pictures": [gallery.picture(i.id, "thumbnail") for i in items],
            "answer": gallery.recall(KEY),
        }
    finally:
        gallery.close()


def test_copy__goes_through_postgresql_and_back(
    bundle: Bundle,
    tmp_path: Path,
    new_database: Callable[[], str],
    random_units: Callable[..., NDArray[np.float32]],
) -> None:
    url = new_database()
    gallery = LoggedGallery(tmp_path / "state", bundle)
    for n, vector in enumerate(random_units(5, 12, 1)):
        item = Item(f"ü/{n}", vector, {"n": n}, b"thumbnail %d" % (n // 2))
        gallery.apply(Change(upserts=[item])).result(WAIT_S)
    gallery.apply(Change(deletes=["ü/3"], idempotency=KEY)).result(WAIT_S)
    gallery.close()
    wanted = known(tmp_path / "state", bundle)
    assert wanted["answer"] is not None

    backup(tmp_path / "state", None, tmp_path / "first")
    report = restore(tmp_path / "first", None, url)
    assert (report.galleries[0].items, report.pictures) == (44, 3)
    assert known(tmp_path / "beside", bundle, url) == wanted
    assert check_main(["--database", url]) == 0
    with pytest.raises(CopyError, match="holds a gallery already"):
        restore(tmp_path / "first", None, url)

    backup(None, url, tmp_path / "second")
    restore(tmp_path / "second", tmp_path / "back", None)
    assert known(tmp_path / "back", bundle) == wanted
