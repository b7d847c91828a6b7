import tomllib
from pathlib import Path
from typing import Any

import httpx2
import pytest

from client import IncompatibleVersion
from client.version import VERSION, compatible


def test_version__is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ("0.1.0", "0.1.7", True),
        ("0.1.0", "0.2.0", False),
        ("0.2.0", "0.1.9", False),
        ("0.9.0", "1.0.0", False),
        ("1.4.0", "1.0.2", True),
        ("2.0.0", "1.9.0", False),
        ("0.1.0", "unknown", True),
    ],
)
def test_compatible(ours: str, theirs: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.version.VERSION", ours)
    assert compatible(theirs) is wanted


@pytest.mark.parametrize("served", ["0.0.9", "7.0.0"], ids=["older", "newer"])
def test_client__another_service_is_refused_by_both_versions(
    fake: Any, service: Any, served: str
) -> None:
    fake.versions = {"invprop": served}
    with pytest.raises(IncompatibleVersion, match=f"the service is invprop {served}, this client"):
        service.embed(b"1")
    assert service.info().versions["invprop"] == served  # to look at, it always can be


def test_client__a_service_that_was_replaced_is_asked_again(fake: Any, service: Any) -> None:
    fake.versions = {"invprop": "7.0.0"}
    with pytest.raises(IncompatibleVersion):
        service.delete_items(["a"])
    fake.versions = {"invprop": VERSION}
    answer = {"model": "m1", "gallery_version": 9, "deleted": 1, "missing": []}
    fake.on("POST", "/items/delete", httpx2.Response(200, json=answer))
    assert service.delete_items(["a"]).deleted == 1
