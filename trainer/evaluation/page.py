"""The page that shows an evaluation to a person: report.html, self-contained, made of report.json.

In: the report, thumbnails of the mistakes. Out: one HTML file without scripts.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.charts import Line, line_chart
from trainer.evaluation.context import Evaluation
from trainer.evaluation.outcome import Outcome
from trainer.html_page import html_page
from trainer.picture_grid import THUMBNAIL_PX, data_uri
from trainer.representation.preprocess import InputContract

# Larger matrices cannot be read as a table: their most frequent confusions are listed instead.
MAX_MATRIX = 20
MAX_CONFUSIONS = 30
MAX_CLASSES = 100  # rows of a per-class table; report.json has all
MAX_SKIPPED = 100
MAX_LISTED = 50  # of a list among the facts, such as the labelled images

Report = Mapping[str, Any]
METRIC_WORDS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean accuracy of the classes",
    "map_11point": "mean average precision, 11 points",
    "map_area": "mean average precision, area",
    "ap": "average precision, IoU 0.5 to 0.95",
    "ap50": "average precision, IoU 0.5",
    "ap75": "average precision, IoU 0.75",
    "map_unsmoothed": "mean average precision, unsmoothed",
}


def mistake_thumbnails(evaluation: Evaluation, outcome: Outcome) -> dict[int, str]:
    """A data URI for each test image that the first result shows as a mistake, by its row.

    Raises:
        DataError: an image can no longer be read.
    """
    rows = sorted({mistake.row for mistake in outcome.results[0].mistakes})
    contract = InputContract(
        size_px=THUMBNAIL_PX, crop_fraction=evaluation.bundle.contract.crop_fraction
    )
    if not rows:
        return {}
    images = evaluation.dataset.test.source.prepared(rows, contract)
    return {row: data_uri(image) for row, image in zip(rows, images, strict=True)}


def evaluation_page(report: Report, shown: Mapping[int, str]) -> str:
    """The page as text.

    Args:
        report: as in report.json.
        shown: row of the test split to data URI, of the first result's mistakes.
    """
    title = f"{report['protocol']} on {report['dataset']['name']}"
    sections = (
        _summary(title, report),
        _results(report),
        _curves(report),
        _per_class(report["results"][0]),
        _confusion(report["results"][0], report["dataset"]["class_names"]),
        _mistakes(report["results"][0], shown),
        _facts(report),
        "</main>\n",
    )
    return html_page(f"Evaluation: {title}", "".join(sections))


def _summary(title: str, report: Report) -> str:
    head, dataset = report["headline"], report["dataset"]
    splits = ", ".join(f"{count:,} {name}" for name, count in dataset["splits"].items())
    told = (
        f"The encoder {report['model_id'][:12]} reached a {_words(head['metric'])} of "
        f"{_share(head['value'])}{_interval(head['interval'])} by {head['result']}."
    )
    if head["untrained"] is not None:
        told += (
            f" The same protocol on an untrained encoder of this architecture: "
            f"{_share(head['untrained'])}"
        )
        if head["gain"] is not None:
            low, high = head["gain"]
            told += f", a difference of {100 * low:.2f} to {100 * high:.2f} points"
        told += "."
    notes = []
    if dataset["divided_by_seed"]:
        notes.append(
            f"The data set has no test split: {dataset['splits']['test']:,} images were drawn by "
            f"the seed {report['seed']}, each class in the same share."
        )
    skipped = {name: len(files) for name, files in dataset["skipped"].items() if files}
    if skipped:
        counted = ", ".join(f"{count} of {name}" for name, count in skipped.items())
        notes.append(f"Broken images were left out: {counted}, listed below.")
    if any(each["facts"].get("converged") is False for each in report["results"]):
        notes.append("A fit ended before it had converged: raise settings.max_iter.")
    warned = "".join(f"<li>{escape(note)}</li>" for note in notes)
    cards = {
        _words(head["metric"]): _share(head["value"]),
        "untrained encoder": None if head["untrained"] is None else _share(head["untrained"]),
        "images": splits,
        "classes": f"{len(dataset['class_names']):,}",
        "time": f"{report['durations_s']['all']:,.0f} s",
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in cards.items()
        if value is not None
    )
    return (
        f'<main>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(told)}</p>\n'
        + (f'<ul class="warnings" aria-label="warnings">{warned}</ul>\n' if warned else "")
        + f'<dl class="facts">{listed}</dl>\n'
    )


def _results(report: Report) -> str:
    names = list(report["results"][0]["metrics"])
    rows = [
        [
            each["name"],
            *(
                _share(each["metrics"].get(name)) + _interval(each["intervals"].get(name))
                for name in names
            ),
            _share((each["untrained"] or {}).get(names[0])),
        ]
        for each in report["results"]
    ]
    head = ["", *map(_words, names), f"untrained, {_words(names[0])}"]
    return (
        f'<h2>Results</h2>\n<p class="note">In brackets the {report["confidence"]:.0%} interval '
        "of a bootstrap over the test images.</p>\n" + _table(head, rows)
    )


def _curves(report: Report) -> str:
    charts = "".join(
        line_chart(
            curve["title"],
            [Line(name, [(x, y) for x, y in points]) for name, points in curve["lines"].items()],
            unit=curve["unit"],
            x_name=curve["x"],
        )
        for curve in report["curves"]
    )
    return f'<h2>Curves</h2>\n<div class="charts">\n{charts}</div>\n' if charts else ""


def _per_class(result: Report) -> str:
    rows = result["per_class"]
    if not rows:
        return ""
    # Choices within a class, such as the figures of each C, stand in report.json.
    names = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    listed = [[_cell(name, row.get(name)) for name in names] for row in rows[:MAX_CLASSES]]
    more = f"<p>{len(rows) - MAX_CLASSES:,} more classes are in report.json.</p>\n"
    return (
        f"<h2>Class by class: {escape(result['name'])}</h2>\n"
        + _table(names, listed)
        + (more if len(rows) > MAX_CLASSES else "")
    )


def _confusion(result: Report, class_names: Sequence[str]) -> str:
    counts = result["confusion"]
    if counts is None:
        return ""
    title = f"<h2>Confusion: {escape(result['name'])}</h2>\n"
    if len(class_names) <= MAX_MATRIX:
        rows = [
            [name, *(f"{n:,}" for n in row)] for name, row in zip(class_names, counts, strict=True)
        ]
        note = '<p class="note">True classes are rows, what they were taken for are columns.</p>\n'
        return title + note + _table(["true", *class_names], rows)
    pairs = sorted(
        ((-n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n)
    )[:MAX_CONFUSIONS]
    rows = [[class_names[i], class_names[j], f"{-n:,}"] for n, i, j in pairs]
    note = '<p class="note">The most frequent confusions; report.json has the whole matrix.</p>\n'
    return title + note + _table(["true", "taken for", "images"], rows)


def _mistakes(result: Report, shown: Mapping[int, str]) -> str:
    mistakes = [each for each in result["mistakes"] if each["row"] in shown]
    if not mistakes:
        return ""
    tiles = "".join(
        f'<li class="tile" title="{escape(each["id"])}">'
        f'<img src="{shown[each["row"]]}" alt="{escape(each["id"])}">'
        f'<span class="same">is {escape(each["label"])}</span>'
        f'<span class="other">✗ {escape(each["predicted"])}</span></li>'
        for each in mistakes
    )
    return (
        '<h2>Most confused pictures</h2>\n<p class="note">The test images whose wrong class was '
        f'furthest above the right one.</p>\n<ul class="tiles">{tiles}</ul>\n'
    )


def _facts(report: Report) -> str:
    files = [
        [name, file["id"], file["reason"]]
        for name, listed in report["dataset"]["skipped"].items()
        for file in listed
    ][:MAX_SKIPPED]
    skipped = (
        "<h2>Images that were left out</h2>\n" + _table(["split", "image", "why"], files)
        if files
        else ""
    )
    kept = {
        name: report[name]
        for name in ("job_id", "model_id", "seed", "settings", "encoder", "facts")
    }
    kept["facts"] = {name: _shortened(value) for name, value in report["facts"].items()}
    kept["dataset"] = {
        name: report["dataset"][name] for name in ("name", "kind", "fingerprint", "splits")
    }
    kept["results"] = {each["name"]: each["facts"] for each in report["results"]}
    kept |= {name: report[name] for name in ("durations_s", "environment")}
    return (
        f"{skipped}<h2>How it was made</h2>\n"
        f"<pre>{escape(json.dumps(kept, indent=1, ensure_ascii=False))}</pre>\n"
    )


def _shortened(value: Any) -> Any:
    if not isinstance(value, list) or len(value) <= MAX_LISTED:
        return value
    return [*value[:MAX_LISTED], f"and {len(value) - MAX_LISTED:,} more, see report.json"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _cell(name: str, value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}" if name == "c" else _share(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.2%} to {ends[1]:.2%})"


def _words(metric: str) -> str:
    return METRIC_WORDS.get(metric, metric)
