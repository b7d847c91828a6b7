"""Evaluations in a real browser against a real service with its worker: nothing is faked here."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.trainer.evaluation.conftest import write_small_bundle

ROOT = Path(__file__).parents[2]
PATIENCE_MS = 120_000  # a worker and then a trainer start, each with its imports


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with a worker and 36 pictures of three classes to evaluate on."""
    folder = tmp_path_factory.mktemp("evaluating")
    draw = np.random.default_rng(0)
    for shade, name in enumerate(("dark", "<i>grey", "light")):
        (folder / "labelled" / name).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 156, (32, 32, 3)) + 40 * shade
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"labelled/{name}/{number}.png")
    datasets = folder / "datasets.yaml"
    datasets.write_text(f"shades: {{kind: folder, root: {folder / 'labelled'}}}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INVPROP_")}
    bundle = write_small_bundle(folder / "bundle")
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "service.run", "--bundle", str(bundle), "--port", "0",
             "--state", str(folder / "state"), "--datasets", str(datasets),
             "--worker", "embedded"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        ) as service,
    ):  # fmt: skip
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            assert line.startswith("ready: http://"), (folder / "log").read_text()
            yield line.split()[1].rstrip("/")
            service.terminate()
            assert service.wait(40) == 0, (folder / "log").read_text()
        finally:
            service.kill()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_evaluations__are_asked_for_watched_read_compared_and_cancelled(
    evaluating: str, visit_of: Callable[..., Iterator[Any]], axe: Callable[[Any], list[str]]
) -> None:
    for visit in visit_of(evaluating):
        page = visit.open("#/evaluations")
        facts = page.locator("form.form .soft").last  # "being counted" until they are
        expect(facts).to_have_text("folder · 3 classes · 30 train · 6 test", timeout=PATIENCE_MS)

        def ask(protocol: str, page: Any = page, **fields: str) -> None:
            page.goto(f"{evaluating}/#/evaluations")
            page.get_by_label("Protocol").select_option(protocol)
            for name, value in fields.items():
                page.locator(f"input[name={name}]").fill(value)
            page.get_by_role("button", name="Evaluate", exact=True).click()

        for seed in ("0", "1"):
            ask("knn", k="5, 1", seed=seed)
            expect(page.locator("p.figure b")).to_contain_text(" %", timeout=PATIENCE_MS)
        assert axe(page) == []
        page.get_by_role("button", name="<i>grey predicted as <i>grey").click()
        expect(page.get_by_text("These are right")).to_be_visible()
        shown = page.locator("p.figure b").inner_text()

        page.goto(f"{evaluating}/#/evaluations")
        expect(page.locator("tr[data-id]").first).to_contain_text(f"{shown}top-1")
        page.get_by_role("checkbox").nth(0).check()
        page.get_by_role("checkbox").nth(1).check()
        page.get_by_role("button", name="Compare two").click()
        expect(page.locator("p.figure b")).to_contain_text("points")
        expect(page.locator("tbody tr").first).to_contain_text("embedding, k=5 · top-1")
        assert axe(page) == []

        ask("linear_probe", epochs="100000")
        expect(page.locator("form [role=alert]")).to_contain_text("greater than the maximum of")
        visit.forgive("422")
        ask("linear_probe", epochs="10000")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".empty h2")).to_have_text("It was cancelled", timeout=PATIENCE_MS)
