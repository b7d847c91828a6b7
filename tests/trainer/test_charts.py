"""Curves and histograms as SVG: places computed by hand, thinning, round ticks.

Run: pytest tests/trainer/test_charts.py
"""

import re
from itertools import pairwise

import pytest

from trainer.charts import (
    MAX_POINTS,
    Line,
    histogram_chart,
    line_chart,
    number_text,
    thinned,
    ticks,
)


def test_ticks__are_round() -> None:
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(0.02, 0.031) == [0.02, 0.025, 0.03]
    assert ticks(1, 30, count=5, whole=True) == [10, 20, 30]
    assert ticks(1, 2, count=5, whole=True) == [1, 2]
    assert ticks(-0.2, 1, count=5) == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.98444, "0.9844"), (1234.5, "1,234"), (8.2e-5, "8.20e-05"), (23.31, "23.31")],
)
def test_number__as_a_person_reads_it(value: float, text: str) -> None:
    assert number_text(value) == text


def test_line__is_where_its_numbers_are() -> None:
    chart = line_chart("T", [Line("a", [(0, 0.0), (10, 1.0)])], unit="u", range_y=(0, 1))
    # 340 x 200 with margins of 46, 10, 18, 34.
    assert 'points="46.0,166.0 330.0,18.0"' in chart
    assert "<title>a, epoch 10: 1</title>" in chart
    assert 'aria-label="T: a 0 at epoch 0, 1 at epoch 10"' in chart


def test_line__that_does_not_change_or_has_one_point() -> None:
    flat = line_chart("T", [Line("a", [(1, 0.0), (2, 0.0)])], unit="")
    assert 'points="46.0,92.0 330.0,92.0"' in flat
    assert 'points="188.0,92.0"' in line_chart("T", [Line("a", [(1, 5.0)])], unit="")
    assert line_chart("T", [Line("a", [])], unit="") == ""


def test_long_line__is_thinned_and_keeps_its_ends() -> None:
    points = [(float(x), float(x)) for x in range(5000)]
    kept = thinned(points)
    assert len(kept) == MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    gaps = {round(b[0] - a[0]) for a, b in pairwise(kept)}
    assert gaps == {31, 32}
    assert line_chart("T", [Line("a", points)], unit="").count("<circle") == MAX_POINTS


def test_names__are_escaped_and_lines_differ_without_colour() -> None:
    chart = line_chart("<T>", [Line("<b>", [(1, 1.0)]), Line("c", [(1, 2.0)])], unit="<u>")
    assert "<b>" not in chart
    assert "<T>" not in chart
    assert "&lt;b&gt;" in chart
    assert 'class="line s0"' in chart
    assert 'class="line s1"' in chart


def test_histogram__is_scaled_to_its_own_sum() -> None:
    chart = histogram_chart("Epoch 1", {"easy": [0, 0, 3, 1], "hard": [0, 0, 0, 0]}, low=0.0)
    assert "easy: 75.0% from 0.00 to 0.50" in chart
    assert "easy: 25.0% from 0.50 to 1.00" in chart
    assert "easy 4 with mean 0.38" in chart  # 0.75 * 0.25 + 0.25 * 0.75
    assert "hard" not in chart
    (area,) = re.findall(r'points="([^"]*)"', chart)
    # Up to 0.75 / 0.7875 of the height, half way across; then a third of that.
    assert area.split()[1:3] == ["46.0,25.0", "188.0,25.0"]
    assert histogram_chart("Epoch 1", {"easy": [0, 0]}) == ""
