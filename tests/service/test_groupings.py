"""service.groupings: accepted is kept, whole or not there, of the version that was asked for."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from service import groupings as module
from service.batching import QueueFull
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Item
from service.graph_keeper import GraphKeeper
from service.groupings import DIRECTORY, Grouping, Groupings
from service.partition import partition
from trainer.representation.bundle import Bundle

PATIENCE_S = 20.0  # waited only where something is wrong
ASKED = {"k": 3, "steps": 2, "min_size": 2}


@contextlib.contextmanager
def serving(
    state: Path, bundle: Bundle, *, graph: int = 5, **options: Any
) -> Iterator[tuple[LoggedGallery, Groupings]]:
    gallery, keeper = LoggedGallery(state, bundle), GraphKeeper(state, neighbours=graph)
    groupings = Groupings(state, graph=keeper, **({"kept": 3, "max_pending": 4} | options))
    keeper.start(gallery)
    groupings.start(gallery)
    try:
        yield gallery, groupings
    finally:
        groupings.close()
        keeper.close()
        gallery.close()


def finished(groupings: Groupings, name: str) -> Grouping:
    for _ in range(int(PATIENCE_S / 0.01)):
        grouping = groupings.get(name)
        assert grouping is not None
        if grouping.finished_at is not None:
            return grouping
        threading.Event().wait(0.01)
    raise AssertionError(grouping)


def contents(groupings: Groupings, name: str) -> list[list[tuple[str, np.float32]]]:
    groups = groupings.groups(name)
    assert groups is not None
    return [groups.members(g, 0, 1000) for g in range(len(groups))]


def change(gallery: LoggedGallery, name: str, seed: int = 0) -> None:
    vector = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    item = Item(name, vector / np.linalg.norm(vector), {})
    gallery.apply(Change(upserts=[item])).result(PATIENCE_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Groupings are computed only once it is open; while it is shut they can be stopped."""
    opened = threading.Event()

    def gated(*arguments: Any, report: Any, **options: Any) -> Any:
        while not opened.wait(0.005):
            report("waiting at the gate", 0, 1)
        return partition(*arguments, report=report, **options)

    monkeypatch.setattr(module, "partition", gated)
    yield opened
    opened.set()


@pytest.mark.parametrize("graph", [5, 0, 2])
def test_grouping__adds_up_with_the_kept_graph_and_without(
    tmp_path: Path, bundle: Bundle, graph: int
) -> None:
    with serving(tmp_path / "one", bundle, graph=graph) as (gallery, groupings):
        asked = groupings.ask(gallery.snapshot(), **ASKED)
        done = finished(groupings, asked.id)
        groups = contents(groupings, asked.id)
    assert (done.state, done.items, done.gallery_version) == ("succeeded", 40, 40)
    assert done.grouped is not None
    assert done.ungrouped is not None
    assert done.grouped + done.ungrouped == 40
    assert sum(map(len, groups)) == done.grouped > 20
    assert [len(g) for g in groups] == sorted(map(len, groups), reverse=True)
    assert all(len(g) >= 2 for g in groups)
    members = [name for group in groups for name, _ in group]
    assert len(set(members)) == len(members)
    for group in groups:
        similarities = [s for _, s in group]
        assert similarities == sorted(similarities, reverse=True)
        assert similarities[0] == pytest.approx(1)
    with serving(tmp_path / "two", bundle, graph=5) as (gallery, groupings):
        again = groupings.ask(gallery.snapshot(), **ASKED)
        finished(groupings, again.id)
        assert again.id == asked.id
        assert contents(groupings, again.id) == groups


def test_grouping__is_of_the_version_it_was_asked_for(
    tmp_path: Path, bundle: Bundle, gate: threading.Event
) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        asked = groupings.ask(gallery.snapshot(), **ASKED)
        gallery.apply(Change(deletes=[f"train/{n:04d}.png" for n in range(30)])).result(PATIENCE_S)
        later = groupings.ask(gallery.snapshot(), **ASKED)
        gate.set()
        assert finished(groupings, asked.id).items == 40
        assert finished(groupings, later.id).items == 10
        assert later.id != asked.id
        names = [name for group in contents(groupings, asked.id) for name, _ in group]
        assert len([name for name in names if name < "train/0030"]) > 15


def test_grouping__asked_for_again_is_the_same(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        first = groupings.ask(gallery.snapshot(), **ASKED)
        done = finished(groupings, first.id)
        assert groupings.ask(gallery.snapshot(), **ASKED) == done
        assert groupings.ask(gallery.snapshot(), **ASKED | {"min_size": 3}).id != first.id
        change(gallery, "a")
        assert groupings.ask(gallery.snapshot(), **ASKED).id != first.id


def test_groupings__beyond_those_that_may_wait_are_refused(
    tmp_path: Path, bundle: Bundle, gate: threading.Event
) -> None:
    with serving(tmp_path, bundle, max_pending=2) as (gallery, groupings):
        snapshot = gallery.snapshot()
        asked = [groupings.ask(snapshot, k=k, steps=1, min_size=1) for k in (1, 2)]
        with pytest.raises(QueueFull) as refused:
            groupings.ask(snapshot, k=3, steps=1, min_size=1)
        assert refused.value.limit == 2
        groupings.ask(snapshot, k=2, steps=1, min_size=1)  # known already: not one more
        gate.set()
        for grouping in asked:
            finished(groupings, grouping.id)
        groupings.ask(snapshot, k=3, steps=1, min_size=1)


def test_groupings__keep_the_last_ones(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path, bundle, kept=2) as (gallery, groupings):
        asked = []
        for k in (1, 2, 3):
            asked.append(groupings.ask(gallery.snapshot(), k=k, steps=1, min_size=1).id)
            finished(groupings, asked[-1])
    assert sorted(p.name for p in (tmp_path / DIRECTORY).iterdir()) == sorted(asked[1:])
    assert (groupings.get(asked[0]), groupings.groups(asked[0])) == (None, None)
    assert {g.id for g in groupings.all()} == set(asked[1:])


def test_groupings__survive_a_restart(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        name = groupings.ask(gallery.snapshot(), **ASKED).id
        done, groups = finished(groupings, name), contents(groupings, name)
        change(gallery, "a")
    with serving(tmp_path, bundle) as (gallery, groupings):
        assert groupings.all() == [finished(groupings, name)]
        assert groupings.get(name) == Grouping(**{**vars(done), "progress": None})
        assert contents(groupings, name) == groups


@pytest.mark.parametrize("changed", [False, True])
def test_grouping__that_was_accepted_is_answered_for_after_a_restart(
    tmp_path: Path, bundle: Bundle, gate: threading.Event, changed: bool
) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        name = groupings.ask(gallery.snapshot(), **ASKED).id
        if changed:
            change(gallery, "a")
    gate.set()
    with serving(tmp_path, bundle) as (gallery, groupings):
        grouping = finished(groupings, name)
        assert grouping.state == ("failed" if changed else "succeeded")
        assert (grouping.error is not None) == changed


@pytest.mark.parametrize("name", ["manifest.json", "ids.npy", "starts.npy"])
def test_grouping__that_is_damaged_is_named_and_not_served(
    tmp_path: Path, bundle: Bundle, name: str
) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        asked = groupings.ask(gallery.snapshot(), **ASKED).id
        finished(groupings, asked)
        groups = contents(groupings, asked)
    path = tmp_path / DIRECTORY / asked / name
    path.write_bytes(path.read_bytes()[:-1])
    with capture_logs() as logs, serving(tmp_path, bundle) as (gallery, groupings):
        assert groupings.get(asked) is None
        (line,) = [line for line in logs if line["event"] == "grouping_dropped"]
        assert name in line["reason"]
        assert groupings.ask(gallery.snapshot(), **ASKED).id == asked
        finished(groupings, asked)
        assert contents(groupings, asked) == groups


def test_grouping__that_fails_says_so_and_may_be_asked_for_again(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with capture_logs() as logs, serving(tmp_path, bundle) as (gallery, groupings):
        monkeypatch.setattr(module, "partition", broken)
        name = groupings.ask(gallery.snapshot(), **ASKED).id
        failed = finished(groupings, name)
        assert (failed.state, failed.groups) == ("failed", None)
        assert "MemoryError" in (failed.error or "")
        monkeypatch.setattr(module, "partition", partition)
        assert groupings.ask(gallery.snapshot(), **ASKED).state == "queued"
        assert finished(groupings, name).state == "succeeded"
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["grouping_failed"]


def test_grouping__without_a_group_says_why(tmp_path: Path, bundle: Bundle) -> None:
    with serving(tmp_path, bundle) as (gallery, groupings):
        name = groupings.ask(gallery.snapshot(), k=1, steps=1, min_size=30).id
        done = finished(groupings, name)
        assert (done.groups, done.ungrouped) == (0, 40)
        assert "min_size = 30" in (done.message or "")
        gallery.apply(Change(deletes=[f"train/{n:04d}.png" for n in range(40)])).result(PATIENCE_S)
        name = groupings.ask(gallery.snapshot(), **ASKED).id
        done = finished(groupings, name)
        assert (done.items, done.groups, done.message) == (0, 0, "the gallery is empty")
