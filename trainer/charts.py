"""Curves and histograms as inline SVG: axes, units, values on hover, no script and no library.

In: names and numbers. Out: markup for trainer.training_report, whose style sheet gives the colours.
Lines differ by dash and by name at their side, not by colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 160  # of a line; longer ones are thinned evenly, the last point always stays
MAX_DOTS = 40  # up to so many points are drawn as dots too
# One unit is a CSS pixel on the narrowest screen, so that text stays readable there.
WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 18, 34

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve; `points` ascend in x."""

    name: str
    points: Sequence[Point]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    range_y: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
    note: str = "",
    x_name: str = "epoch",
) -> str:
    """A figure of some lines over the epochs; empty where no line has a point.

    Args:
        unit: of y, said in the caption.
        range_y: what the axis shows; by default what the points need.
        marks: name to the epoch at which something began.
        note: a sentence under the title.
        x_name: what is counted instead of epochs.
    """
    drawn = [Line(line.name, thinned(line.points)) for line in lines if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    axes = _Axes(_range(xs), range_y or _range(ys))
    parts = [axes.frame(x_name, whole=True)]
    for name, x in (marks or {}).items():
        if axes.x_range[0] < x < axes.x_range[1]:
            place = axes.x(x)
            parts.append(
                f'<line class="mark" x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text class="small" x="{place + 3}" y="{TOP - 6}">{escape(name)}</text>'
            )
    for number, line in enumerate(drawn):
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in line.points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
    for number, line in enumerate(drawn):
        dot = "dot" if len(line.points) <= MAX_DOTS else "spot"
        parts += [
            f'<circle class="{dot} s{number}" cx="{axes.x(x)}" cy="{axes.y(y)}" r="3">'
            f"<title>{escape(line.name)}, {x_name} {x:g}: {number_text(y)}</title></circle>"
            for x, y in line.points
        ]
    said = "; ".join(
        f"{line.name} {number_text(line.points[0][1])} at {x_name} {line.points[0][0]:g}, "
        f"{number_text(line.points[-1][1])} at {x_name} {line.points[-1][0]:g}"
        for line in drawn
    )
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<line class="line s{number}" x1="0" x2="24" y1="4" y2="4"/></svg>{escape(line.name)} '
        f'<span class="number">{number_text(line.points[-1][1])}</span></li>'
        for number, line in enumerate(drawn)
    )
    return _figure(title, unit, note, svg("".join(parts), f"{title}: {said}"), legend)


def histogram_chart(title: str, counts: Mapping[str, Sequence[int]], *, low: float = -1.0) -> str:
    """A figure of several histograms over similarities up to 1, each scaled to its own sum.

    Args:
        counts: name to counts in equal bins of [-1, 1].
        low: where the axis begins; no count lies below.
    """
    filled = {name: each for name, each in counts.items() if sum(each)}
    if not filled:
        return ""
    shares = {name: [n / sum(each) for n in each] for name, each in filled.items()}
    top = max(max(each) for each in shares.values())
    axes = _Axes((low, 1.0), (0.0, top * 1.05))
    parts = [axes.frame("similarity to the anchor")]
    said = []
    names = list(counts)
    for name, each in shares.items():
        number, width = names.index(name), 2 / len(each)
        corners, hovers, middle = [], [], 0.0
        for place, share in enumerate(each):
            left, right = -1 + place * width, -1 + (place + 1) * width
            middle += share * (left + right) / 2
            if right <= low + 1e-9:
                continue
            corners += [f"{axes.x(left)},{axes.y(share)}", f"{axes.x(right)},{axes.y(share)}"]
            if share:
                x, y = axes.x(left), axes.y(share)
                hovers.append(
                    f'<rect class="spot" x="{x}" y="{y}" width="{axes.x(right) - x:.1f}" '
                    f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(name)}: {share:.1%} from '
                    f"{left:.2f} to {right:.2f}</title></rect>"
                )
        base = HEIGHT - BOTTOM
        area = f"{axes.x(low)},{base} {' '.join(corners)} {axes.x(1.0)},{base}"
        parts.append(f'<polygon class="area s{number}" points="{area}"/>')
        parts += hovers
        said.append(f"{name} {sum(filled[name]):,} with mean {middle:.2f}")
    label = f"{title}: {'; '.join(said)}"
    return _figure(title, "share of each", "", svg("".join(parts), label), "")


def legend(names: Sequence[str]) -> str:
    """The key of histograms, once for all of them."""
    return "".join(
        f'<li><svg class="key" viewBox="0 0 24 12" aria-hidden="true"><rect class="area s{number}" '
        f'x="1" y="1" width="22" height="10"/></svg>{escape(name)}</li>'
        for number, name in enumerate(names)
    )


def svg(content: str, label: str) -> str:
    """A drawing with its alternative text."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `MAX_POINTS`, evenly picked, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(MAX_POINTS)]


def ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], about `count` of them: steps of 1, 2 or 5 times 10^n."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number as a person reads it: three or four digits that matter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


class _Axes:
    """From numbers to places in the drawing."""

    def __init__(self, x_range: Point, y_range: Point) -> None:
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def frame(self, x_name: str, *, whole: bool = False) -> str:
        base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in ticks(*self.y_range):
            place, text = self.y(value), number_text(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place}" y2="{place}"/>'
                f'<text x="{LEFT - 6}" y="{place + 4}" text-anchor="end">{text}</text>'
            )
        for value in ticks(*self.x_range, count=5, whole=whole):
            place = self.x(value)
            anchor = "end" if place > right - 8 else "middle"
            parts.append(
                f'<line class="axis" x1="{place}" x2="{place}" y1="{base}" y2="{base + 4}"/>'
                f'<text x="{place}" y="{base + 16}" text-anchor="{anchor}">{value:g}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text class="small" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">'
            f"{escape(x_name)}</text>"
        )
        return "".join(parts)


def _range(values: Sequence[float]) -> Point:
    """A little more than the values take, and never nothing."""
    low, high = min(values), max(values)
    if high == low:
        return low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5)
    return low, high


def _figure(title: str, unit: str, note: str, drawing: str, keys: str) -> str:
    said = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    under = f'<p class="note">{escape(note)}</p>' if note else ""
    listed = f'<ul class="legend">{keys}</ul>' if keys else ""
    return (
        f"<figure><figcaption>{escape(title)}{said}{under}</figcaption>{drawing}{listed}</figure>\n"
    )
