"""service.datasets and service.dataset_file: what an operator registers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service import datasets
from service.dataset_description import Description, Undescribed
from service.datasets import Registry, RegistryError, UnknownDataset, open_registry
from tests.service.conftest import encoded

GOOD = """
birds: {kind: folder, root: birds, test_share: 0.3}
digits: {kind: npz, root: /data/digits.npz, label: y}
objects:
  kind: torchvision
  root: tv
  set: cifar10
scans: {kind: table, root: scans.csv, images: pictures, label: grade}
voc07: {kind: voc, root: VOC2007}
places: {kind: list, root: places, splits: {train: train.txt, test: val.txt}}
web: {kind: webdataset, root: shards, splits: {train: "train-{000..009}.tar"}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "datasets.yaml"
    path.write_text(GOOD)
    return path


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_registry__gives_plain_values_with_absolute_paths(file: Path, tmp_path: Path) -> None:
    registered = open_registry(file)
    assert registered.names() == ("birds", "digits", "objects", "places", "scans", "voc07", "web")
    birds = registered.get("birds")
    assert (birds.name, birds.kind) == ("birds", "folder")
    assert birds.spec() == {
        "name": "birds",
        "kind": "folder",
        "root": str(tmp_path / "birds"),
        "test_share": 0.3,
    }
    assert registered.get("digits").spec()["root"] == "/data/digits.npz"
    assert registered.get("scans").spec()["images"] == str(tmp_path / "pictures")
    assert json.loads(json.dumps(registered.get("places").spec()))["splits"]["test"] == "val.txt"


def test_registry__every_entry_is_what_the_trainer_takes(file: Path) -> None:
    from trainer.evaluation.job import parse_job

    for dataset in open_registry(file).all():
        parse_job({"protocol": "knn", "bundle": "b", "dataset": dataset.spec()})


def test_spec__is_the_callers_own(file: Path) -> None:
    registered = open_registry(file)
    registered.get("places").spec()["splits"].clear()
    assert registered.get("places").spec()["splits"]


def test_registry__of_no_file_or_an_empty_one_registers_nothing(tmp_path: Path) -> None:
    assert open_registry(None).names() == ()
    (tmp_path / "empty.yaml").write_text("# later\n")
    registered = open_registry(tmp_path / "empty.yaml")
    assert registered.all() == ()
    with pytest.raises(UnknownDataset, match=r"no data set 'x' is registered; there are none"):
        registered.get("x")


def test_get__of_an_unknown_name_says_which_there_are(file: Path) -> None:
    with pytest.raises(UnknownDataset, match=r"'\.\./birds' is registered; there are birds"):
        open_registry(file).get("../birds")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {kind: folder, root: x, splits: {training: y}}", r"no key 'training' in splits"),
        ("a: {kind: folder, root: x, labels: y}", "no key 'labels'; this kind takes kind, max_"),
        ("a: {kind: npz, root: x, class_names: [1]}", r'class_names.0: 1 is not of type "string"'),
        ("a: {kind: folder}", "root is missing"),
        ("a: {root: x}", "kind is missing; wanted one of .*folder, list, npz"),
        ("a: {kind: zip, root: x}", "kind='zip'; wanted one of"),
        ("a: {kind: [folder], root: x}", "wanted one of"),
        ("a: {kind: list, root: x}", "splits is missing"),
        ("a: {kind: torchvision, root: x, set: nowhere}", 'set: "nowhere" is not one of'),
        ("a: {kind: folder, root: x, test_share: 1.5}", "test_share: 1.5 is greater than"),
        ("a: {kind: folder, root: 3}", 'root: 3 is not of type "string"'),
        ("a: {kind: folder, root: x, name: b}", "there is no key 'name'"),
        ("a: {kind: folder, root: x, test_share: 2026-01-01}", "data set 'a'"),
        ("../a: {kind: folder, root: x}", r'name: "../a" does not match'),
        ("7: {kind: folder, root: x}", "a name is a text"),
        ("a: folder", "wanted keys with values"),
        ("a: {3: x}", "wanted keys with values"),
        ("- a", "wanted at most 1000 data sets"),
        ("a: {kind: folder, root: x}\na: {kind: folder, root: y}", "the key 'a' stands twice"),
        ("a: [", "is no YAML"),
        ("a: !!python/object:os.system {}", "is no YAML"),
        ("a: '" + "x" * 2**20 + "'", "more than 1,048,576 bytes"),
    ],
)
def test_registry__refuses_and_names(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "datasets.yaml"
    path.write_text(text)
    with pytest.raises(RegistryError, match=message) as refused:
        open_registry(path)
    assert "datasets.yaml" in str(refused.value) or "data set 'a'" in str(refused.value)


def test_registry__of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"gone.yaml cannot be read: No such file"):
        open_registry(tmp_path / "gone.yaml")


def test_registry__is_read_again_when_it_changes(file: Path) -> None:
    clock = Clock()
    registered = Registry(file, clock=clock)
    file.write_text("new: {kind: folder, root: x}")
    assert "birds" in registered.names()  # it is not looked at that often
    clock.now = datasets.RECHECK_S
    assert registered.names() == ("new",)
    assert registered.problem is None


def test_registry__keeps_what_it_had_where_a_change_cannot_be_read(file: Path) -> None:
    clock = Clock()
    registered = Registry(file, clock=clock)
    file.write_text("birds: {kind: nothing}")
    clock.now = 10
    with capture_logs() as logs:
        assert registered.get("birds").kind == "folder"
        assert registered.get("birds").kind == "folder"
    assert [line["event"] for line in logs] == ["datasets_unreadable"]
    assert "kind='nothing'" in logs[0]["reason"]
    assert registered.problem is not None
    assert str(file.parent) not in registered.problem
    clock.now = 20
    file.unlink()
    assert registered.get("birds").kind == "folder"
    file.write_text("other: {kind: folder, root: x}")
    clock.now = 30
    assert (registered.names(), registered.problem) == (("other",), None)


FOUND = Description(
    task="single_label",
    classes=2,
    class_names=("a", "b"),
    counts={"train": 100, "test": 50},
    divided_by_seed=True,
    max_skipped=0.01,
    fingerprint="f" * 64,
    broken={"train": {"count": 1, "first": [{"id": "a/1.png", "reason": "cut short"}]}},
)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text("a: {kind: folder, root: x}\nb: {kind: folder, root: y}")
    return path


def test_check__tells_what_there_is(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(spec: Any, *, images: bool, **_: Any) -> Description:
        asked.append((spec["name"], images))
        return FOUND

    monkeypatch.setattr(datasets, "describe", fake)
    assert datasets.main(["check", "--datasets", str(two)]) == 0
    told = capsys.readouterr().out
    assert "a: folder, 2 classes, 100 train, 50 test (divided by seed)\n" in told
    assert "  1 broken images in train\n    a/1.png: cut short\n" in told
    assert asked == [("a", True), ("b", True)]
    assert datasets.main(["check", "--datasets", str(two), "--no-images", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sound"] is True
    assert answer["datasets"][1]["counts"] == {"train": 100, "test": 50}
    assert asked[2:] == [("a", False), ("b", False)]


def test_check__of_a_set_that_cannot_be_opened_or_is_too_broken(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {"test": {"count": 3, "first": []}}

    def fake(spec: Any, **_: Any) -> Description | Undescribed:
        if spec["name"] == "a":
            return Undescribed("data set a: its root x does not exist")
        return Description.of({**FOUND.as_dict(), "broken": many})

    monkeypatch.setattr(datasets, "describe", fake)
    monkeypatch.setenv("INVPROP_DATASETS", str(two))
    assert datasets.main(["check"]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM: a: data set a: its root x does not exist\n" in told
    assert "PROBLEM: b: 3 of the 50 images of test are broken, more than max_skipped = 0.01" in told


def test_check__of_a_wrong_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert datasets.main(["check", "--datasets", str(tmp_path / "gone")]) == 2
    assert "gone cannot be read" in capsys.readouterr().err
    monkeypatch.delenv("INVPROP_DATASETS", raising=False)
    assert datasets.main(["check"]) == 2
    assert "error: give --datasets FILE" in capsys.readouterr().err


def test_check__that_is_interrupted_says_so(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def interrupted(spec: Any, *, memory_bytes: int, **_: Any) -> Description:
        asked.append(memory_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "describe", interrupted)
    monkeypatch.setenv("INVPROP_DATASET_MEMORY_BYTES", "1000000000")
    assert datasets.main(["check", "--datasets", str(two)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert asked == [1_000_000_000]


def test_check__with_the_trainers_own_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "pets" / name / f"{i}.png").write_bytes(encoded(i))
    path = tmp_path / "datasets.yaml"
    path.write_text("pets: {kind: folder, root: pets}\ngone: {kind: folder, root: nowhere}")
    assert datasets.main(["check", "--datasets", str(path)]) == 1
    told = capsys.readouterr().out
    assert "pets: folder, 2 classes, 8 train, 2 test (divided by seed)\n" in told
    assert f"PROBLEM: gone: data set gone: its root {tmp_path / 'nowhere'} does not exist" in told
