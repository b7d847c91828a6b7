"""Evaluations in a real browser, against the contract: the routes are a fake in the browser."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.fake_evaluations import FakeEvaluations


@pytest.fixture
def fake(visit: Any) -> FakeEvaluations:
    made = FakeEvaluations()
    made.install(visit.page)
    return made


def test_form__is_made_from_the_data_sets(visit: Any, fake: FakeEvaluations) -> None:
    page = visit.open("#/evaluations")
    protocols = "s => [...s.options].map((o) => o.value)"
    single = ["knn", "linear_probe", "semi_supervised", "transfer"]
    assert page.get_by_label("Protocol").evaluate(protocols) == single
    expect(page.locator("form.form .soft").last).to_have_text(
        "folder · 3 classes · 120 train · 60 test"
    )
    page.get_by_label("Data set").select_option("voc")
    assert page.get_by_label("Protocol").evaluate(protocols) == ["voc07_svm", "detection"]


def test_evaluation__is_asked_for_watched_and_read(visit: Any, fake: FakeEvaluations) -> None:
    page = visit.open("#/evaluations")
    page.locator("input[name=k]").fill("20, 5")
    page.locator("input[name=seed]").fill("3")
    page.get_by_role("button", name="Evaluate", exact=True).click()
    expect(page.locator(".figure b")).to_have_text("90.0 %")
    assert fake.posted == [
        {"protocol": "knn", "dataset": "digits", "settings": {"k": [20, 5]}, "seed": 3}
    ]


def test_report__shows_figures_curve_and_the_mistakes_of_a_cell(
    visit: Any, fake: FakeEvaluations
) -> None:
    page = visit.open("#/evaluations/one")
    expect(page.locator(".figure b")).to_have_text("84.0 %")
    assert page.locator(".intervals .number").first.inner_text() == "84.0 % 80.0 % – 88.0 %"
    points = page.locator("polyline").get_attribute("points").split()
    heights = [float(point.partition(",")[2]) for point in points]
    assert heights[1] < heights[0] < heights[2], "84 stands above 80 above 79.5"
    page.get_by_label("c predicted as <b>: 3").click()
    assert page.locator(".mistakes li").inner_text().startswith("c/<7>.png")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save report.json").click()
    assert '"value": 0.84' in Path(saving.value.path()).read_text()


def test_running__shows_progress_and_can_be_cancelled(visit: Any, fake: FakeEvaluations) -> None:
    page = visit.open("#/evaluations")
    expect(page.get_by_text("running features 25.0 %")).to_be_visible()
    page.goto(f"{visit.site}/#/evaluations/slow")
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "25")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".empty h2")).to_have_text("It was cancelled")
    assert fake.cancelled == ["slow"]


def test_failed__says_why_as_text(visit: Any, fake: FakeEvaluations) -> None:
    page = visit.open("#/evaluations/bad")
    assert page.locator(".empty p").inner_text() == "no <i>"


def test_two__are_compared_with_the_interval_of_their_difference(
    visit: Any, fake: FakeEvaluations
) -> None:
    fake.jobs.pop("slow")  # nothing runs: the list stands still
    page = visit.open("#/evaluations")
    boxes = page.get_by_role("checkbox")
    boxes.nth(0).check()
    expect(page.get_by_role("button", name="Compare two")).to_be_disabled()
    boxes.nth(1).check()
    page.get_by_role("button", name="Compare two").click()
    # 3 points; half the interval is sqrt(4^2 + 4^2) = 5.66 points.
    expect(page.locator("p.figure")).to_have_text("+3.0 points B − A, -2.7 points to +8.7 points")
    expect(page.get_by_text("Chance may explain it.")).to_be_visible()
