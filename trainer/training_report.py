"""The page that shows a run to a person: report.html, self-contained, made of what the run wrote.

In: the run's report, recipe, metrics, pictures. Out: one HTML file. Apart from times and paths the
same run gives the same page, resumed or not.
"""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trainer.charts import Line, histogram_chart, legend, line_chart, number_text
from trainer.config import Recipe
from trainer.datasets import ImageSource
from trainer.decode_pool import DecodePool
from trainer.html_page import html_page
from trainer.inspection import BINS
from trainer.picture_grid import Pictures, grid, thumbnails
from trainer.run_folder import HISTOGRAMS, Metrics, RunFolder, read_pictures, write_whole

MAX_HISTOGRAMS = 6  # epochs of which histograms are drawn, the first and the last among them
MAX_LISTED = 200  # skipped files on the page; report.json has all
NOTHING_LEFT_OUT = 0.995  # of the reached positives chosen: choosing hard ones chooses nothing

# What curves show: title, unit, keys of metrics.jsonl with the words for them, fixed range.
CURVES: tuple[tuple[str, str, dict[str, str], tuple[float, float] | None], ...] = (
    ("Losses", "nats", {"instance": "instance", "invariance": "invariance"}, None),
    ("kNN accuracy", "share of images", {"knn": "kNN"}, None),
    (
        "Label purity of positives",
        "share of one class",
        {
            "purity_reached": "all reached",
            "purity_chosen": "chosen",
            "purity_hop_1": "first hop",
            "purity_chance": "by chance",
        },
        (0, 1),
    ),
    ("Positives reached", "images per anchor", {"reached": "reached"}, None),
    (
        "Chosen positives",
        "share",
        {
            "hard_share": "of the reached",
            "positives_in_top": "inside the top M",
            "no_background": "anchors without background",
        },
        (0, 1),
    ),
    (
        "Mean similarity to the anchor",
        "cosine",
        {
            "similarity_easy": "easy positives",
            "similarity_hard": "hard positives",
            "similarity_background": "background",
        },
        None,
    ),
    ("Spread of similarities in a batch", "standard deviation", {"spread": "spread"}, None),
    ("Throughput", "images/s", {"images_per_s": "training"}, None),
    ("Learning rate", "", {"lr": "learning rate"}, None),
)


def write_training_report(
    folder: RunFolder,
    report: Mapping[str, Any],
    recipe: Recipe,
    metrics: Sequence[Metrics],
    train: ImageSource,
    pool: DecodePool,
) -> Path:
    """Write report.html, whole or not at all.

    Raises:
        DataError: an image that is to be shown can no longer be read.
        OSError: the page cannot be written; an older one stays.
    """
    pictures = read_pictures(folder)
    shown: dict[int, str] = {}
    if pictures is not None:
        crop = recipe.data.crop_fraction
        shown = thumbnails(pictures, train, pool, crop_fraction=crop)
    write_whole(folder.page, training_page(folder.root, report, recipe, metrics, pictures, shown))
    return folder.page


def training_page(
    root: Path,
    report: Mapping[str, Any],
    recipe: Recipe,
    metrics: Sequence[Metrics],
    pictures: Pictures | None,
    shown: Mapping[int, str],
) -> str:
    """The page as text.

    Args:
        root: the run's folder, for the commands to go on with.
        report: as in report.json.
        metrics: lines of metrics.jsonl with their histograms.
        pictures: as in pictures.json; None where no epoch was inspected.
        shown: seat to data URI of every image in `pictures`.
    """
    title = f"Training report: {report['source']}"
    sections = (
        _summary(title, report, recipe, metrics),
        _curves(recipe, metrics),
        _histograms(metrics),
        _pictures(pictures, shown),
        _facts(report, recipe),
        _next(root, report),
    )
    return html_page(title, "".join(sections))


def warnings(report: Mapping[str, Any], recipe: Recipe, metrics: Sequence[Metrics]) -> list[str]:
    """What a person should know before using the encoder, in plain words."""
    facts, data = report["training"], report["data"]
    last = metrics[-1] if metrics else {}
    found = []
    if report["status"] != "finished":
        reason = report.get("ended_by") or "it did not come to its end"
        found.append(f"The run is not finished, there is no bundle: {reason}.")
    if facts["collapsed_epochs"] and "COLLAPSE" not in report.get("ended_by", ""):
        epochs = _spans(facts["collapsed_epochs"])
        since = "" if last.get("collapsed") else ", which it has left since"
        found.append(
            f"COLLAPSE in the epochs {epochs}{since}: all images got nearly the same embedding. "
            "Set encoder.normalise=true, or a higher loss.temperature."
        )
    before, after = facts["knn_untrained"], facts["knn_trained"]
    if before is not None and after is not None and after < before:
        found.append("Training made the embeddings worse than the untrained network's.")
    if data["images_skipped"]:
        found.append(f"Skipped files: {data['images_skipped']:,}, listed below with the reasons.")
    if recipe.loss.warmup_epochs >= recipe.epochs:
        found.append(
            f"The invariance loss never counted: loss.warmup_epochs={recipe.loss.warmup_epochs} is "
            f"not below epochs={recipe.epochs}. This was instance discrimination alone."
        )
    elif last.get("hard_share", 0) >= NOTHING_LEFT_OUT:
        found.append(
            "All reached positives are chosen, so that hard and easy ones are not told apart: "
            f"loss.num_positives={recipe.loss.num_positives} is as many as an anchor reaches "
            f"({last['reached']:.0f}). Lower it, or raise loss.steps."
        )
    empty = [line["no_background"] for line in metrics if "no_background" in line]
    if empty and empty[-1] > 0:
        found.append(
            f"{empty[-1]:.0%} of the inspected anchors have no background left, so they add "
            "nothing to the invariance loss: raise loss.num_background, or lower loss.steps."
        )
    return found


def _summary(
    title: str, report: Mapping[str, Any], recipe: Recipe, metrics: Sequence[Metrics]
) -> str:
    facts, data, encoder = report["training"], report["data"], recipe.encoder
    trained = [line for line in metrics if line["epoch"] > 0]
    per_epoch = data["images_trained_on"] // recipe.batch_size * recipe.batch_size
    seconds = sum(per_epoch / line["images_per_s"] for line in trained)
    sentences = [
        f"A {encoder.backbone} encoder ({encoder.image_size_px} px, embeddings of {encoder.dim} "
        f"numbers) was trained by Invariance Propagation on {data['images_trained_on']:,} images "
        f"of {report['source']}, without their labels, for {len(trained)} of {recipe.epochs} "
        f"epochs: {_duration(seconds)} of training on {report['device']}."
    ]
    before, after = facts["knn_untrained"], facts["knn_trained"]
    if after is not None:
        asked = data["images_held_out"]
        against = f"{asked:,} held-out images" if asked else "training images, each left out"
        sentences.append(
            f"The kNN accuracy on {against} went from {before:.1%} untrained to {after:.1%}."
        )
    elif not data["labels"]:
        sentences.append("There are no labels, so no accuracy was measured.")
    purest = next((line for line in reversed(metrics) if "purity_chosen" in line), None)
    if purest is not None:
        sentences.append(
            f"At epoch {purest['epoch']}, {purest['purity_chosen']:.0%} of the positives that the "
            f"invariance loss pulled in were of their anchor's class; "
            f"{purest['purity_chance']:.0%} would be by chance."
        )
    rates = [line["images_per_s"] for line in trained]
    cards = {
        "kNN, untrained to trained": None if after is None else f"{before:.3f} → {after:.3f}",
        "images trained on": f"{data['images_trained_on']:,}",
        "epochs": f"{len(trained)} of {recipe.epochs}",
        "time of training": _duration(seconds),
        "median throughput": f"{median(rates):,.0f} images/s" if rates else None,
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in cards.items()
        if value is not None
    )
    told = "".join(f"<li>{escape(each)}</li>" for each in warnings(report, recipe, metrics))
    return (
        f'<main>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(" ".join(sentences))}</p>\n'
        + (f'<ul class="warnings" aria-label="warnings">{told}</ul>\n' if told else "")
        + f'<dl class="facts">{listed}</dl>\n'
    )


def _curves(recipe: Recipe, metrics: Sequence[Metrics]) -> str:
    marks = {"invariance loss on": recipe.loss.warmup_epochs + 0.5}
    charts = "".join(
        line_chart(
            title,
            [
                Line(words, [(line["epoch"], line[key]) for line in metrics if key in line])
                for key, words in keys.items()
            ],
            unit=unit,
            range_y=range_y,
            marks=marks if "invariance" in keys or "reached" in keys else None,
        )
        for title, unit, keys, range_y in CURVES
    )
    if not charts:
        return "<h2>Curves</h2>\n<p>No epoch came to its end.</p>\n"
    return (
        '<h2>Curves</h2>\n<p class="note">Epoch 0 is the untrained encoder. Hover over a line for '
        "its values; beside each name stands the last one. metrics.jsonl has all of them.</p>\n"
        f'<div class="charts">\n{charts}</div>\n'
    )


def _histograms(metrics: Sequence[Metrics]) -> str:
    seen = [line for line in metrics if HISTOGRAMS in line]
    if not seen:
        return ""
    count = min(MAX_HISTOGRAMS, len(seen))
    step = (len(seen) - 1) / max(count - 1, 1)
    picked = [seen[round(i * step)] for i in range(count)]
    names = {"easy": "easy positives", "hard": "hard positives", "background": "background"}
    filled = [
        place
        for line in picked
        for each in line[HISTOGRAMS].values()
        for place, n in enumerate(each)
        if n
    ]
    low = min(-1 + min(filled, default=0) * 2 / BINS, 0.0)
    charts = "".join(
        histogram_chart(
            f"Epoch {line['epoch']}",
            {words: line[HISTOGRAMS][key] for key, words in names.items()},
            low=low,
        )
        for line in picked
    )
    return (
        '<h2>Similarity of positives and background</h2>\n<p class="note">How similar the anchors '
        f"({seen[-1]['inspected']} un-augmented training images, the same at every epoch) are to "
        "what they reach and to what they are told from. Hard positives are those reached that are "
        "least similar, the easy ones the rest; background is what of the M nearest is not "
        "reached. Each is scaled to its own sum.</p>\n"
        f'<ul class="legend">{legend(list(names.values()))}</ul>\n'
        f'<div class="charts">\n{charts}</div>\n'
    )


def _pictures(pictures: Pictures | None, shown: Mapping[int, str]) -> str:
    if pictures is None:
        return "<h2>Anchors and their positives</h2>\n<p>No epoch was inspected yet.</p>\n"
    labelled = any(each["label"] is not None for each in pictures["first"])
    by = (
        "with the smallest share of positives of their own class"
        if labelled
        else "whose positives are least similar to them on average"
    )
    signs = " ✓ and ✗ say whether a positive is of the anchor's class." if labelled else ""
    worst = (
        f'<h2>The worst of them</h2>\n<p class="note">Of all inspected anchors those {by}.</p>\n'
        f"{grid(pictures['worst'], shown)}"
        if pictures["worst"]
        else ""
    )
    return (
        f"<h2>Anchors and their positives at epoch {pictures['epoch']}</h2>\n"
        '<p class="note">The anchors are the first of a sample that the seed drew before training '
        "began: nobody chose them. Beside each stand the most and the least similar of the images "
        "that propagation along the neighbour graph reached, with their similarity and the number "
        "of hops; a solid frame means that the loss pulled it in, a dashed one that it did not."
        f"{signs}</p>\n{grid(pictures['first'], shown)}{worst}"
    )


def _facts(report: Mapping[str, Any], recipe: Recipe) -> str:
    data = report["data"]
    rows = {
        "images found": f"{data['images_found']:,}",
        "trained on, held out, skipped": f"{data['images_trained_on']:,}, "
        f"{data['images_held_out']:,}, {data['images_skipped']:,}",
        "other files": f"{data['other_files']:,}",
        "device, processes": f"{report['device']}, {report['processes']}",
        **{f"time: {name}": _duration(value) for name, value in report["seconds"].items()},
        "fingerprint of the images": data["fingerprint"],
        "model": report.get("model_id"),
        **report["versions"],
    }
    table = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in rows.items()
        if value is not None
    )
    recipe_text = yaml.safe_dump(recipe.as_dict(), sort_keys=False)
    return (
        f"<h2>Data, recipe, environment</h2>\n{_skipped(data['skipped'])}"
        f"<details><summary>The resolved recipe</summary><pre>{escape(recipe_text)}</pre>"
        f"</details>\n<details open><summary>Data and environment</summary><table>{table}</table>"
        "</details>\n"
    )


def _skipped(files: Sequence[Mapping[str, str]]) -> str:
    if not files:
        return ""
    rows = "".join(
        f"<tr><td>{escape(file['id'])}</td><td>{escape(file['reason'])}</td></tr>"
        for file in files[:MAX_LISTED]
    )
    more = len(files) - MAX_LISTED
    rest = f"<p>And {more:,} more, see report.json.</p>" if more > 0 else ""
    return (
        f"<details><summary>Skipped files ({len(files):,})</summary><table><tr>"
        f'<th scope="col">file</th><th scope="col">reason</th></tr>{rows}</table>{rest}</details>\n'
    )


def _next(root: Path, report: Mapping[str, Any]) -> str:
    if report["status"] == "finished":
        words = ["--bundle", str(root / "bundle"), "--state", str(root / "service")]
        told, command = "Serve it", shlex.join(["python", "-m", "service.run", *words])
    elif "--resume" in report.get("ended_by", "--resume"):
        words = ["--resume", "--data", report["source"], "--output", str(root)]
        told, command = "Go on with it", shlex.join(["python", "-m", "trainer.run", *words])
    else:
        return (
            "<h2>What comes next</h2>\n<p>What ended this run would end it again: begin a new one "
            "with what the warning above says.</p>\n</main>\n"
        )
    return f"<h2>What comes next</h2>\n<p>{told}:</p>\n<pre>{escape(command)}</pre>\n</main>\n"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{number_text(seconds / 3600)} h"


def _spans(epochs: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and epoch == spans[-1][1] + 1:
            spans[-1][1] = epoch
        else:
            spans.append([epoch, epoch])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
