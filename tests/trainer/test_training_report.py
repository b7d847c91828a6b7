"""The page of a run: well formed, alone, safe from file names, small, and the same each time.

Run: pytest tests/trainer/test_training_report.py
"""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import Recipe
from trainer.datasets import open_source
from trainer.decode_pool import DecodePool
from trainer.inspection import BINS, Inspection
from trainer.picture_grid import data_uri, thumbnails
from trainer.pictures import SHOWN_FIRST, SHOWN_POSITIVES, SHOWN_WORST, pictures
from trainer.training_report import training_page, warnings

HOSTILE = "<script>alert('x')</script>.svg"
VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """Tags must close in order; attributes and visible text are kept."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _inspection(anchors: int, width: int) -> Inspection:
    """Anchor a reaches a + 1, a + 2, ..., ever less similar; hop 1 the first two; half chosen."""
    own = np.arange(anchors, dtype=np.int64)
    shape = (anchors, width)
    places = np.broadcast_to(np.arange(width), shape)
    return Inspection(
        anchors=own,
        reached=own[:, None] + 1 + places,
        hops=np.where(places < 2, 1, 2),
        similarities=np.broadcast_to(0.9 - 0.05 * np.arange(width), shape).astype(np.float32),
        chosen=places >= width // 2,
        in_top=np.ones(shape, bool),
        background=np.full((anchors, BINS), 2),
        background_sum=np.zeros(anchors),
    )


def _report(**changes: Any) -> dict[str, Any]:
    data = {
        "images_found": 44,
        "images_trained_on": 40,
        "images_held_out": 3,
        "images_skipped": 1,
        "skipped": [{"id": HOSTILE, "reason": "no <b>image</b>"}],
        "other_files": 0,
        "labels": True,
        "fingerprint": "f00d",
    }
    training = {
        "epochs": 2,
        "knn_untrained": 0.25,
        "knn_trained": 0.75,
        "collapsed_epochs": [],
    }
    values = {
        "status": "finished",
        "source": HOSTILE,
        "device": "cpu",
        "processes": 1,
        "data": data,
        "training": training,
        "seconds": {"survey": 1.0},
        "versions": {"python": "3"},
        "model_id": "abc",
    }
    return values | changes


def _lines(epochs: int = 2) -> list[dict[str, Any]]:
    seen = _inspection(20, 4)
    labels = np.arange(40) % 2
    figures = {"loss": 3.0, "instance": 3.0, "invariance": 1.0, "reached": 4.0, "hard_share": 0.5}
    figures |= {"spread": 0.2, "images_per_s": 10.0, "lr": 0.03, "collapsed": False, "knn": 0.7}
    return [
        {"epoch": 0, "knn": 0.25},
        *(
            {
                "epoch": epoch,
                **figures,
                **seen.figures(labels),
                "histograms": seen.histograms(),
            }
            for epoch in range(1, epochs + 1)
        ),
    ]


def _page(recipe: Recipe, report: dict[str, Any] | None = None, **changes: Any) -> str:
    ids = [f"{HOSTILE}{i}" for i in range(40)]
    shown = pictures(_inspection(20, 4), 2, ids, np.arange(40) % 2)
    uris = dict.fromkeys(range(40), "data:image/jpeg;base64,AAAA")
    words: dict[str, Any] = {"metrics": _lines(), "pictures": shown, "shown": uris} | changes
    return training_page(Path("runs/my run"), report or _report(), recipe, **words)


def test_page__is_well_formed_and_asks_nothing_of_a_network(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    page = _page(tiny_recipe())
    parsed = Parsed(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert not {"link", "iframe", "object", "a"} & set(parsed.tags)
    fetched = [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert fetched
    assert all(value.startswith("data:image/jpeg;base64,") for value in fetched)
    assert not re.search(r"https?:|url\(|@import|xlink", page)
    images = [v for tag, name, v in parsed.attributes if tag == "img" and name == "alt"]
    assert len(images) == parsed.tags.count("img")
    labelled = [v for tag, name, v in parsed.attributes if tag == "svg" and name == "aria-label"]
    assert all(labelled)
    assert len(labelled) == 9 + 2  # curves, and histograms of two epochs
    assert parsed.tags.count("h1") == 1


def test_page__escapes_hostile_names(tiny_recipe: Callable[..., Recipe]) -> None:
    page = _page(tiny_recipe())
    assert "<script" not in page
    assert "<b>image" not in page
    parsed = Parsed(page)
    assert f"Training report: {HOSTILE}" in parsed.text
    assert "no <b>image</b>" in parsed.text
    assert ("img", "alt", f"anchor {HOSTILE}0") in parsed.attributes


def test_page__is_the_same_each_time(tiny_recipe: Callable[..., Recipe]) -> None:
    assert _page(tiny_recipe()) == _page(tiny_recipe())
    assert _page(tiny_recipe()) != _page(tiny_recipe("seed=1"))


def test_page__says_in_words_what_happened(tiny_recipe: Callable[..., Recipe]) -> None:
    text = Parsed(_page(tiny_recipe())).text
    assert "went from 25.0% untrained to 75.0%" in text
    assert "on 3 held-out images" in text
    assert "8 s of training on cpu" in text  # 2 epochs of 5 batches of 8 at 10 images/s
    assert "At epoch 2, 50% of the positives" in text
    assert "49% would be by chance" in text
    assert "python -m service.run --bundle 'runs/my run/bundle'" in text


def test_page__of_a_run_that_was_stopped(tiny_recipe: Callable[..., Recipe]) -> None:
    report = _report(status="stopped", ended_by="stopped; go on with --resume")
    report["training"] |= {"knn_trained": None, "collapsed_epochs": [1, 2, 3, 7]}
    page = _page(tiny_recipe(), report, pictures=None, shown={})
    parsed = Parsed(page)
    assert parsed.open == []
    assert "there is no bundle: stopped; go on with --resume." in parsed.text
    assert "COLLAPSE in the epochs 1-3, 7, which it has left since:" in parsed.text
    assert "No epoch was inspected yet." in parsed.text
    assert "trainer.run --resume --data '<script>" in parsed.text
    nothing = Parsed(_page(tiny_recipe(), report, metrics=[], pictures=None, shown={}))
    assert "No epoch came to its end." in nothing.text
    assert nothing.open == []


def test_page__of_a_run_that_failed(tiny_recipe: Callable[..., Recipe]) -> None:
    report = _report(status="stopped", ended_by="COLLAPSE, epoch 2: nothing is published")
    report["training"] |= {"collapsed_epochs": [1, 2]}
    text = Parsed(_page(tiny_recipe(), report)).text
    assert text.count("COLLAPSE") == 1
    assert "What ended this run would end it again" in text
    assert "--resume" not in text


def test_page__without_labels(tiny_recipe: Callable[..., Recipe]) -> None:
    report = _report()
    report["data"] |= {"labels": False, "images_held_out": 0}
    report["training"] |= {"knn_untrained": None, "knn_trained": None}
    ids = [str(i) for i in range(40)]
    seen = _inspection(20, 4)
    lines = [
        {name: v for name, v in line.items() if not name.startswith(("purity", "knn"))}
        for line in _lines()
    ]
    page = _page(tiny_recipe(), report, metrics=lines, pictures=pictures(seen, 2, ids, None))
    text = Parsed(page).text
    assert "There are no labels" in text
    assert "✗" not in text
    assert "whose positives are least similar" in text


@pytest.mark.parametrize(
    ("overrides", "report", "line", "told"),
    [
        (["loss.warmup_epochs=2"], {}, {}, "instance discrimination alone"),
        ([], {}, {"hard_share": 1.0}, "loss.num_positives=4 is as many as an anchor reaches (4)"),
        ([], {}, {"no_background": 0.25}, "25% of the inspected anchors have no background"),
        ([], {"knn_trained": 0.2}, {}, "made the embeddings worse"),
    ],
)
def test_warnings__say_what_to_do(
    tiny_recipe: Callable[..., Recipe],
    overrides: list[str],
    report: dict[str, Any],
    line: dict[str, Any],
    told: str,
) -> None:
    quiet, loud = _report(), _report()
    for each in (quiet, loud):
        each["data"] |= {"images_skipped": 0}
    loud["training"] |= report
    lines = _lines()
    assert warnings(quiet, tiny_recipe(), lines) == []
    lines[-1] |= line
    (said,) = warnings(loud, tiny_recipe(*overrides), lines)
    assert told in said


def test_pictures__are_the_first_and_the_worst() -> None:
    seen = _inspection(20, 5)
    labels = np.zeros(40, np.int64)
    labels[18:] = 1  # anchors 14..17 lose their class by and by
    made = pictures(seen, 7, [f"{i}.png" for i in range(40)], labels)
    assert [each["seat"] for each in made["first"]] == list(range(SHOWN_FIRST))
    assert [each["seat"] for each in made["worst"]] == [17, 16, 15, 14, 13]
    assert len(made["worst"]) == SHOWN_WORST
    anchor = made["worst"][3]
    assert (anchor["id"], anchor["reached"], anchor["chosen"]) == ("14.png", 5, 3)
    assert anchor["of_its_class"] == 3
    assert [each["seat"] for each in anchor["nearest"]] == [15, 16, 17]
    assert [each["seat"] for each in anchor["farthest"]] == [19, 18]
    assert anchor["farthest"][0] == {
        "seat": 19,
        "id": "19.png",
        "label": 1,
        "similarity": 0.7,
        "hop": 2,
        "chosen": True,
    }


def test_thumbnails__of_every_seat_and_of_bounded_size(packed: Callable[..., Path]) -> None:
    source = open_source(str(packed(40)))
    made = pictures(_inspection(20, 12), 2, source.ids, source.labels)
    with DecodePool(0) as pool:
        shown = thumbnails(made, source, pool, crop_fraction=1.0)
    assert set(range(SHOWN_FIRST)) < set(shown)
    # The most that can be shown, were every image noise, the hardest there is to compress.
    most = (SHOWN_FIRST + SHOWN_WORST) * (1 + 2 * SHOWN_POSITIVES)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    assert len(data_uri(noise)) * most < 2_600_000


def test_page__of_a_long_run_stays_small(tiny_recipe: Callable[..., Recipe]) -> None:
    assert len(_page(tiny_recipe(), metrics=_lines(3000))) < 450_000
