"""service.tune: what it measures is what the service then uses, as long as it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from service import tune
from service.gallery import tuning
from service.gallery.choice import Choice, SearchOptions
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Item
from service.tune import Figures, TuneError, best_of, main
from trainer.representation.bundle import Bundle

LOTS = 2**40


@pytest.fixture
def state(bundle: Bundle, tmp_path: Path, random_units: Callable[..., NDArray[np.float32]]) -> Path:
    """A stopped service's state of 340 items."""
    gallery = LoggedGallery(tmp_path, bundle)
    items = [Item(f"i{n}", v, {}) for n, v in enumerate(random_units(300, 12, 1))]
    gallery.apply(Change(upserts=items)).result(30)
    gallery.close()
    return tmp_path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.001)


def index_of(bundle: Bundle, state: Path, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """What a service on this state says of its index, and what it logged."""
    with capture_logs() as lines:
        gallery = LoggedGallery(state, bundle, search=SearchOptions(LOTS, **options))
        choice = gallery._upkeep._choose(len(gallery.snapshot()))
        gallery.close()
    return {"kind": choice.kind, "effort": choice.effort}, lines


def test_tune__measures_and_the_service_uses_it(
    bundle: Bundle, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--state", str(state), "--exact-items", "100", "--recall", "0.9"]) == 0
    table = capsys.readouterr().out
    assert "340 items, 34 of them asked for" in table
    report = orjson.loads((state / "tuning.json").read_bytes())["report"]
    assert {f["kind"] for f in report["figures"]} == {"flat", "flat-fp16", "hnsw", "ivf"}
    for figures in report["figures"]:
        if figures["kind"].startswith("flat"):
            assert figures["recall"] == 1
        assert figures["single_qps"] > 0
    assert report["choice"]["kind"] in ("hnsw", "ivf")
    chosen, _ = index_of(bundle, state, exact_items=100)
    assert chosen == report["choice"]
    chosen, _ = index_of(bundle, state, exact_items=1000)  # exact is asked for
    assert chosen["kind"] == "flat"


@pytest.mark.parametrize("how", ["damaged", "torn", "stale", "strange"])
def test_tuning__that_does_not_hold_is_ignored_and_named(
    bundle: Bundle, state: Path, how: str
) -> None:
    assert main(["--state", str(state), "--exact-items", "100"]) == 0
    path = state / "tuning.json"
    content = orjson.loads(path.read_bytes())
    if how == "damaged":
        content["report"]["choice"]["effort"] += 1
    if how in ("stale", "strange"):
        change = {"stale": ("items", 100), "strange": ("log_id", "other")}[how]
        content["report"][change[0]] = change[1]
        content["sha256"] = tuning._digest(content["report"])
    path.write_bytes(orjson.dumps(content)[: 50 if how == "torn" else None])
    chosen, lines = index_of(bundle, state, exact_items=100)
    assert chosen == {"kind": "hnsw", "effort": 64}
    assert [line["event"] for line in lines].count("tuning_ignored") == 1


def row(kind: str, effort: int, recall: float, qps: float, memory: int = 10) -> Figures:
    return Figures(kind, effort, recall, qps, qps, memory, 0.0)


FIGURES = [
    row("flat", 0, 1.0, 50, 100),
    row("flat-fp16", 0, 1.0, 60, 50),
    row("hnsw", 16, 0.93, 900, 120),
    row("hnsw", 32, 0.96, 700, 120),
    row("hnsw", 64, 0.99, 400, 120),
    row("ivf", 4, 0.95, 300, 60),
]


@pytest.mark.parametrize(
    ("recall", "exact", "allowed", "kind", "effort"),
    [
        (0.95, False, 1000, "hnsw", 32),
        (0.98, False, 1000, "hnsw", 64),
        (0.9999, False, 1000, "hnsw", 64),  # none does: the one of most recall
        (0.95, False, 100, "ivf", 4),
        (0.95, True, 1000, "flat-fp16", 0),
        (0.95, True, 99, "flat-fp16", 0),
    ],
)
def test_best_of__is_the_fastest_that_reaches_the_recall_and_fits(
    recall: float, exact: bool, allowed: int, kind: str, effort: int
) -> None:
    found = best_of(FIGURES, recall=recall, exact=exact, allowed_bytes=allowed)
    assert found == Choice(kind, effort)  # type: ignore[arg-type]


def test_best_of__says_when_nothing_fits() -> None:
    with pytest.raises(TuneError, match="none of hnsw, ivf fits into 5 bytes"):
        best_of(FIGURES, recall=0.9, exact=False, allowed_bytes=5)


def test_tune__says_what_is_wrong(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = LoggedGallery(tmp_path, bundle)
    assert main(["--state", str(tmp_path)]) == 1
    assert "in use by process" in capsys.readouterr().err
    gallery.close()
    assert main(["--state", str(tmp_path)]) == 1
    assert "the gallery has 40 items; from 100 on" in capsys.readouterr().err
    assert main(["--state", str(tmp_path / "nowhere")]) == 1
    assert "is no directory" in capsys.readouterr().err
    assert main(["--state", str(tmp_path), "--recall", "2"]) == 1
    assert "wanted 0..1" in capsys.readouterr().err
