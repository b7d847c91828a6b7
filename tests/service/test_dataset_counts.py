"""service.dataset_counts: counted once, again when the data change, and kept over a restart."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.dataset_counts import LOOK_AGAIN_S, DatasetCounts, Known, marks_of, without_paths
from service.dataset_description import Description, Undescribed
from service.dataset_file import RegisteredDataset


class Reader:
    """A fake of the trainer's readers: counts files, remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.fails: str | None = None

    def __call__(self, spec: Any, stopping: Callable[[], bool]) -> Description | Undescribed:
        self.asked.append(spec["name"])
        while not self.go.wait(0.01):
            if stopping():
                return Undescribed("stopping")
        if self.fails == "defect":
            raise RuntimeError("a defect")
        if self.fails is not None:
            return Undescribed(self.fails, "details")
        count = sum(1 for path in Path(spec["root"]).rglob("*") if path.is_file())
        return Description(
            "single_label", 2, ("a", "b"), {"train": count}, False, 0.01, f"of {count}"
        )


@pytest.fixture
def pets(tmp_path: Path) -> RegisteredDataset:
    root = tmp_path / "pets"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "1.png").touch()
    return RegisteredDataset("pets", "folder", {"name": "pets", "root": str(root)})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def counts(state: Path, reader: Reader, *datasets: RegisteredDataset) -> Iterator[DatasetCounts]:
    made = DatasetCounts(state, describe=reader, clock=Clock())
    made.start(datasets)
    try:
        yield made
    finally:
        made.close()


def settled(made: DatasetCounts, dataset: RegisteredDataset, *, after_s: float = 0) -> Known:
    """What is known once nothing waits to be looked at."""
    made._clock.now += after_s  # type: ignore[attr-defined]
    made.look(dataset)
    for _ in range(1000):
        with made._changed:
            if not made._waiting:
                break
        threading.Event().wait(0.005)
    return made.look(dataset)


def test_look__answers_at_once_and_counts_beside(tmp_path: Path, pets: RegisteredDataset) -> None:
    reader = Reader()
    reader.go.clear()
    with counts(tmp_path, reader, pets) as made:
        assert made.look(pets) == Known("counting")
        reader.go.set()
        known = settled(made, pets)
        assert known.state == "ready"
        assert known.description is not None
        assert known.description.counts == {"train": 1}
    assert reader.asked == ["pets"]


def test_look__counts_again_only_what_changed(tmp_path: Path, pets: RegisteredDataset) -> None:
    reader = Reader()
    with counts(tmp_path, reader, pets) as made:
        settled(made, pets)
        settled(made, pets, after_s=LOOK_AGAIN_S)
        assert reader.asked == ["pets"]
        cat = Path(pets.values["root"]) / "train" / "cat"
        (cat / "2.png").touch()
        os.utime(cat, ns=(1, 1))  # whatever the file system's clock says
        assert settled(made, pets, after_s=1).description.counts == {"train": 1}  # type: ignore[union-attr]
        known = settled(made, pets, after_s=LOOK_AGAIN_S)
        assert known.description is not None
        assert known.description.counts == {"train": 2}
    assert reader.asked == ["pets", "pets"]


def test_look__of_another_entry_under_the_name_forgets_the_old_one(
    tmp_path: Path, pets: RegisteredDataset
) -> None:
    reader = Reader()
    other = RegisteredDataset("pets", "folder", {**pets.values, "root": str(tmp_path / "none")})
    with counts(tmp_path, reader, pets) as made:
        settled(made, pets)
        reader.go.clear()
        assert made.look(other) == Known("counting")
        reader.go.set()
        known = settled(made, other)
        assert known.description is not None
        assert known.description.counts == {"train": 0}


def test_counts__are_kept_over_a_restart(tmp_path: Path, pets: RegisteredDataset) -> None:
    reader = Reader()
    with counts(tmp_path, reader, pets) as made:
        first = settled(made, pets)
    with counts(tmp_path, reader, pets) as made:
        assert settled(made, pets) == first
    assert reader.asked == ["pets"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"schema": "invprop.dataset/1"}'])
def test_counts__that_are_damaged_are_made_again(
    damage: bytes, tmp_path: Path, pets: RegisteredDataset
) -> None:
    reader = Reader()
    with counts(tmp_path, reader, pets) as made:
        settled(made, pets)
    (tmp_path / "datasets" / "pets.json").write_bytes(damage)
    with capture_logs() as logs, counts(tmp_path, reader, pets) as made:
        assert settled(made, pets).state == "ready"
    assert [line["event"] for line in logs] == ["dataset_cache_damaged"]
    assert reader.asked == ["pets", "pets"]


def test_counts__go_on_where_the_state_cannot_be_written(
    tmp_path: Path, pets: RegisteredDataset
) -> None:
    (tmp_path / "datasets").touch()
    with capture_logs() as logs, counts(tmp_path, Reader(), pets) as made:
        assert settled(made, pets).state == "ready"
    assert "dataset_cache_not_written" in [line["event"] for line in logs]


def test_problem__names_no_path_and_is_looked_at_again_when_the_data_change(
    tmp_path: Path, pets: RegisteredDataset
) -> None:
    reader, root = Reader(), Path(pets.values["root"])
    reader.fails = f"data set pets: the class 'x' has no image below {root}/train"
    with capture_logs() as logs, counts(tmp_path, reader, pets) as made:
        known = settled(made, pets)
        assert known.state == "failed"
        assert known.problem == "data set pets: the class 'x' has no image below ROOT/train"
        assert settled(made, pets, after_s=LOOK_AGAIN_S) == known
        reader.fails = None
        (root / "train" / "x").mkdir()
        assert settled(made, pets, after_s=LOOK_AGAIN_S).state == "ready"
    assert [line["reason"] for line in logs] == [
        f"data set pets: the class 'x' has no image below {root}/train"
    ]


def test_problem__of_a_defect_ends_nothing(tmp_path: Path, pets: RegisteredDataset) -> None:
    reader = Reader()
    reader.fails = "defect"
    with capture_logs() as logs, counts(tmp_path, reader, pets) as made:
        assert settled(made, pets).problem == "it cannot be counted; the service's log says why"
        reader.fails = None
        assert settled(made, pets, after_s=LOOK_AGAIN_S).state == "ready"
    assert [line["event"] for line in logs] == ["dataset_failed"]


def test_close__gives_up_what_is_being_counted(tmp_path: Path, pets: RegisteredDataset) -> None:
    reader = Reader()
    reader.go.clear()
    with counts(tmp_path, reader, pets):
        pass
    assert not (tmp_path / "datasets").exists()


def test_marks__change_with_classes_splits_and_files_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "train" / "a").mkdir(parents=True)
    spec = {"root": str(root), "splits": {"train": "lists/train.txt"}}
    seen = [list(marks_of(spec))]

    def differs() -> bool:
        seen.append(list(marks_of(spec)))
        return seen[-1] != seen[-2]

    assert not differs()
    (root / "train" / "b").mkdir()
    assert differs()
    (root / "labels.csv").write_text("x")
    assert differs()
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("x")
    assert differs()
    (root / "lists" / "train.txt").write_text("xy")
    assert differs()
    assert list(marks_of({"root": str(tmp_path / "none")})) == [(str(tmp_path / "none"), -1, 2)]


def test_without_paths__leaves_slashes_alone_where_the_root_is_one() -> None:
    assert without_paths("in / and /x/y", {"root": "/"}) == "in / and /x/y"
    assert without_paths("/d/t.csv, /d/i/1.png", {"root": "/d/t.csv", "images": "/d/i"}) == (
        "ROOT, IMAGES/1.png"
    )
    assert without_paths("FOLDER is /d, not /d/t.csv", {"root": "/d/t.csv"}) == (
        "FOLDER is FOLDER, not ROOT"
    )
