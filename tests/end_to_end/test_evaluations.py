"""An evaluation from the request to the report: a real service, its worker, a real kNN.

The worker is killed in the middle. The numbers are those of the same evaluation run by hand.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.trainer.evaluation.conftest import write_small_bundle
from trainer.representation.bundle import open_bundle

ROOT = Path(__file__).parents[2]
LEASE_S = 2
SETTINGS = {"k": [5, 1]}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of 40 pictures in two classes that differ in how light they are."""
    draw = np.random.default_rng(0)
    for shade, name in enumerate(("dark", "light")):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 156, (32, 32, 3)) + 60 * shade
            path = tmp_path / "labelled" / name / f"{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "labelled"


def worker_of(service: int) -> psutil.Process:
    """The embedded worker's process."""
    (found,) = [
        process
        for process in psutil.Process(service).children(recursive=True)
        if process.cmdline()[1:3] == ["-m", "celery"]
    ]
    return found


@pytest.mark.timeout(600)
def test_evaluation__outlives_its_worker_and_equals_one_run_by_hand(
    labelled: Path, tmp_path: Path
) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    datasets = tmp_path / "datasets.yaml"
    datasets.write_text(f"shades: {{kind: folder, root: {labelled}}}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INVPROP_")}
    log, tick = tmp_path / "service.log", threading.Event()
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "service.run", "--bundle", str(bundle), "--port", "0",
             "--state", str(tmp_path / "state"), "--datasets", str(datasets),
             "--worker", "embedded", "--evaluation-lease-s", str(LEASE_S)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
        ) as service,
    ):  # fmt: skip
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            assert line.startswith("ready: http://"), log.read_text()
            url = line.split()[1]
            request = {"protocol": "knn", "dataset": "shades", "settings": SETTINGS, "seed": 3}
            accepted = httpx2.post(f"{url}/evaluations", json=request, timeout=30)
            assert accepted.status_code == 202, accepted.text
            where = f"{url}{accepted.headers['location']}"

            def look() -> Any:
                return httpx2.get(where, timeout=30).json()

            while (found := look())["status"] == "queued":
                tick.wait(0.1)
            assert found["status"] == "running", found
            killed = worker_of(service.pid)
            while not (evaluating := killed.children(recursive=True)):
                tick.wait(0.02)  # leased, and not begun yet
            killed.send_signal(signal.SIGKILL)
            while (found := look())["status"] in ("queued", "running"):
                tick.wait(0.2)
            assert found["status"] == "succeeded", found
            assert found["attempts"] == 2
            page = httpx2.get(f"{where}/report", timeout=30)
            assert page.headers["content-type"].startswith("text/html")
            assert "sandbox" in page.headers["content-security-policy"]
            assert "shades" in page.text
            _, left = psutil.wait_procs(evaluating, timeout=10)
            assert left == []
            below = psutil.Process(service.pid).children(recursive=True)
            service.terminate()
            assert service.wait(40) == 0, log.read_text()
            _, left = psutil.wait_procs(below, timeout=10)
            assert left == []
        finally:
            service.kill()

    job = {
        "protocol": "knn",
        "bundle": str(bundle),
        "dataset": {"name": "shades", "kind": "folder", "root": str(labelled)},
        "settings": SETTINGS,
        "seed": 3,
        "device": "cpu",
        "workers": 0,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run(
        [sys.executable, "-m", "trainer.evaluate", "--job", str(tmp_path / "job.json"),
         "--output", str(tmp_path / "by hand")],
        cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    by_hand = json.loads((tmp_path / "by hand" / "report.json").read_text())
    assert found["report"]["results"] == by_hand["results"]
    assert found["report"]["model_id"] == by_hand["model_id"] == open_bundle(bundle).model_id
