"""GET /datasets: what is registered, with counts once they are known, and no path."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.datasets import RegistryError
from service.settings import Settings
from tests.service.conftest import Service, encoded


@pytest.fixture
def registered(
    tmp_path: Path, start_service: Callable[..., Iterator[Service]]
) -> Iterator[tuple[Service, Path]]:
    """A service with one data set that can be opened and one that cannot."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / "pets" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "data" / "pets" / name / f"{i}.png").write_bytes(encoded(i))
    file = tmp_path / "data" / "datasets.yaml"
    file.write_text("pets: {kind: folder, root: pets}\ngone: {kind: folder, root: nowhere}\n")
    for service in start_service(tmp_path / "state", datasets=file):
        yield service, file


def listed(service: Service) -> dict[str, Any]:
    answer = service.client.get("/datasets")
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


def test_datasets__are_listed_with_their_counts(registered: tuple[Service, Path]) -> None:
    service, file = registered
    for _ in range(600):
        body = listed(service)
        if all(item["state"] != "counting" for item in body["items"]):
            break
        time.sleep(0.05)
    gone, pets = body["items"]
    assert (body["problem"], body["next"]) == (None, None)
    assert {**pets, "fingerprint": None} == {
        "name": "pets",
        "kind": "folder",
        "state": "ready",
        "task": "single_label",
        "classes": 2,
        "class_names": ["cat", "dog"],
        "counts": {"train": 8, "test": 2},
        "divided_by_seed": True,
        "fingerprint": None,
        "problem": None,
    }
    assert (gone["state"], gone["counts"]) == ("failed", None)
    assert gone["problem"] == (
        "data set gone: its root ROOT does not exist: put it there, or correct root"
    )
    assert str(file.parent) not in str(body)


def test_datasets__of_a_service_without_any(shared_service: Service) -> None:
    assert listed(shared_service) == {"items": [], "problem": None, "next": None}


def test_application__does_not_start_on_a_wrong_file(tmp_path: Path) -> None:
    file = tmp_path / "datasets.yaml"
    file.write_text("a: {kind: zip}")
    with pytest.raises(RegistryError, match="kind='zip'"):
        create_app(Settings(bundle=tmp_path, state=tmp_path, datasets=file))
