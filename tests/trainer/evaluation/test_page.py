"""The page of an evaluation: what it shows, that it is one file, that foreign text is escaped.

Run: pytest tests/trainer/evaluation/test_page.py
"""

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.page import evaluation_page

Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(page: str) -> _Seen:
    seen = _Seen()
    seen.feed(page)
    return seen


@pytest.fixture
def made(run_job: Run) -> tuple[dict[str, Any], str]:
    """A probe so short that it makes mistakes."""
    settings = {"epochs": 2, "lr": 0.001, "batch_size": 32}
    code, _, output = run_job(protocol="linear_probe", settings=settings)
    assert code == 0
    report = json.loads((output / "report.json").read_text())
    return report, (output / "report.html").read_text()


def test_page__shows_figures_curves_confusion_and_mistakes(
    made: tuple[dict[str, Any], str],
) -> None:
    report, page = made
    seen = _read(page)
    value = report["headline"]["value"]
    assert f"{value:.2%}" in seen.text
    assert "Training loss" in seen.text
    assert seen.tags.count("svg") >= 2
    confusion = report["results"][0]["confusion"]
    assert sum(map(sum, confusion)) == 30
    assert seen.tags.count("tr") >= 3 + 3  # a row for each class in two tables
    mistakes = report["results"][0]["mistakes"]
    assert mistakes
    assert seen.tags.count("img") == len(mistakes)
    assert all(source.startswith("data:image/jpeg;base64,") for source in seen.sources)
    assert not {"script", "link", "iframe"} & set(seen.tags)


def test_page__escapes_what_is_not_ours(made: tuple[dict[str, Any], str]) -> None:
    report, nasty = copy.deepcopy(made[0]), "<script>alert(1)</script>"
    report["dataset"]["class_names"][0] = nasty
    report["results"][0]["per_class"][0]["class"] = nasty
    report["dataset"]["skipped"] = {"test": [{"id": nasty, "reason": nasty}]}
    for mistake in report["results"][0]["mistakes"]:
        mistake |= {"id": nasty, "label": nasty}
    seen = _read(
        evaluation_page(report, {m["row"]: "data:," for m in report["results"][0]["mistakes"]})
    )
    assert "script" not in seen.tags
    assert seen.text.count(nasty) >= 4


def test_page__of_many_classes_lists_the_most_frequent_confusions(
    made: tuple[dict[str, Any], str],
) -> None:
    report = copy.deepcopy(made[0])
    count = 30
    report["dataset"]["class_names"] = [f"c{i}" for i in range(count)]
    matrix = [[0] * count for _ in range(count)]
    matrix[4][9], matrix[2][1], matrix[3][3] = 7, 5, 99
    report["results"][0]["confusion"] = matrix
    seen = _read(evaluation_page(report, {}))
    assert "c4c97\nc2c15\n" in seen.text
