"""The gallery beside a dict and brute force, for longer and with crashes: any order of calls.

Run: pytest tests/faults/test_service_model.py     --long: 5,000 runs of 50 steps
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from service.gallery import levels
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Snapshot
from tests.service.conftest import build_bundle
from tests.service.gallery.test_logged import COLOURS, GRID, AgainstAModel, do
from trainer.representation.bundle import Bundle, open_bundle

# Nothing here is about what reaches a disk, which would only slow it down.
MEMORY = Path("/dev/shm")
KEPT_SNAPSHOTS = 4


def listed(snapshot: Snapshot) -> list[tuple[str, str]]:
    """(id, colour) of every item in its order."""
    items = [snapshot.item(int(row)) for row in snapshot.rows()]
    return [(item.id, item.metadata["colour"]) for item in items]


class WithCrashes(AgainstAModel):
    """Adds kills, old snapshots, deletes by filter and listings that go on while others write."""

    def _open(self) -> None:
        if not hasattr(self, "_home"):
            self._directory.cleanup()
            place = MEMORY if MEMORY.is_dir() else None
            self._directory = tempfile.TemporaryDirectory(dir=place)
            self._home = Path(self._directory.name) / "0"
            self._old: list[tuple[Snapshot, list[tuple[str, str]]]] = []
        self.gallery = LoggedGallery(self._home, self.empty_bundle)
        self.seen = [self.gallery.snapshot()]
        self.gallery.on_change(self.seen.append)
        self._begin_walk()

    @rule()
    def crash(self) -> None:
        """What a kill leaves: the directory as it is at this moment."""
        version = self.gallery.snapshot().version
        left = self._home.with_name(str(int(self._home.name) + 1))
        shutil.copytree(self._home, left)
        self.gallery.close()
        shutil.rmtree(self._home)
        self._home = left
        self._open()
        assert self.gallery.snapshot().version == version

    @rule(colour=COLOURS)
    def delete_by_filter(self, colour: str) -> None:
        matching = [i for i, (_, c) in self.model.items() if c == colour]
        done = do(self.gallery, delete_matching={"colour": [colour]}, most_matching=100)
        assert (done.deleted, list(done.missing)) == (len(matching), [])
        for item_id in matching:
            self.model.pop(item_id)

    @rule()
    def keep_a_snapshot(self) -> None:
        snapshot = self.gallery.snapshot()
        self._old = [*self._old[1 - KEPT_SNAPSHOTS :], (snapshot, listed(snapshot))]

    @rule(vector=st.sampled_from(range(len(GRID))))
    def look_at_old_snapshots(self, vector: int) -> None:
        for snapshot, items in self._old:
            assert listed(snapshot) == items
            rows = snapshot.search(GRID[vector][None], 20).rows[0]
            found = {snapshot.item(int(row)).id for row in rows if row >= 0}
            assert found == {item_id for item_id, _ in items}

    @rule(limit=st.integers(1, 3))
    def turn_a_page(self, limit: int) -> None:
        """A listing that goes on while others write gives what nobody touches exactly once."""
        snapshot = self.gallery.snapshot()
        page = snapshot.page(after=self._cursor, limit=limit)
        self._walked += [snapshot.item(int(row)).id for row in page.rows]
        if page.next is not None:
            self._cursor = page.next
            return
        for item_id, seq in self._at_start.items():
            row = snapshot.row(item_id)
            if row is not None and snapshot.seqs(np.asarray([row]))[0] == seq:
                assert self._walked.count(item_id) == 1, item_id
        self._begin_walk()

    @invariant()
    def keeps_its_vectors(self) -> None:
        snapshot = self.gallery.snapshot()
        vectors = snapshot.vectors(snapshot.rows())
        wanted = [vector.tobytes() for vector, _ in self.model.values()]
        assert [vector.tobytes() for vector in vectors] == wanted

    def _begin_walk(self) -> None:
        snapshot = self.gallery.snapshot()
        rows = snapshot.rows()
        ids = [snapshot.item(int(row)).id for row in rows]
        self._at_start = dict(zip(ids, snapshot.seqs(rows).tolist(), strict=True))
        self._cursor, self._walked = 0, list[str]()


@pytest.mark.parametrize(
    ("runs", "steps"),
    [
        pytest.param(200, 30, marks=pytest.mark.timeout(600)),
        pytest.param(5000, 50, marks=[pytest.mark.long, pytest.mark.timeout(14400)]),
    ],
)
def test_gallery__agrees_with_a_dict_through_crashes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    steps: int,
) -> None:
    # So small that segments are merged and compacted all the time.
    monkeypatch.setattr(levels, "SMALL_ROWS", 2)
    monkeypatch.setattr(levels, "MAX_DEAD", 1)
    bundle = open_bundle(build_bundle(tmp_path / "empty", images=0))
    three = {f: getattr(bundle, f) for f in ("directory", "model_id", "contract", "manifest")}

    class Empty(Bundle):
        def gallery(self) -> Any:
            whole = bundle.gallery()
            return whole._replace(embeddings=np.empty((0, 3), np.float32))

    empty = Empty(**three, feature_dim=16, embedding_dim=3)
    machine = type("Machine", (WithCrashes,), {"empty_bundle": empty})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,  # the same draws every time: no seed to be told
            suppress_health_check=list(HealthCheck),
        ),
    )
