"""An evaluation from the request to the report: a real service, its worker, a real kNN.

Worker and child are killed in the middle. The numbers are those of the same evaluation run by hand.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
SEED = 3
KNN = {"k": [5, 1]}
FINE_TUNING = {"share": 1.0, "epochs": 60, "batch_size": 4, "untrained": False}
STAGE = "fine-tuning"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("INVPROP_")}


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


def child_of(worker: psutil.Process) -> psutil.Process | None:
    """The evaluation that a worker runs."""
    for process in worker.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[1:3] == ["-m", "trainer.evaluate"]:
                return process
    return None


@dataclass(frozen=True)
class Running:
    """A service with an embedded worker."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def submit(self, protocol: str, settings: dict[str, Any]) -> str:
        """The address of an evaluation on the shades."""
        asked = {"protocol": protocol, "dataset": "shades", "settings": settings, "seed": SEED}
        accepted = httpx2.post(f"{self.url}/evaluations", json=asked, timeout=30)
        assert accepted.status_code == 202, accepted.text
        return f"{self.url}{accepted.headers['location']}"


def look(where: str) -> Any:
    return httpx2.get(where, timeout=30).json()


def until(where: str, wanted: Callable[[Any], bool]) -> Any:
    """The evaluation once it is so, or once it has ended."""
    while not wanted(found := look(where)) and found["finished_at"] is None:
        threading.Event().wait(0.05)
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_small_bundle(tmp_path / "bundle")


@pytest.fixture
def service(
    bundle: Path, labelled: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Running]:
    datasets = tmp_path / "datasets.yaml"
    datasets.write_text(f"shades: {{kind: folder, root: {labelled}}}\n")
    log = tmp_path / "service.log"
    lease_s = str(getattr(request, "param", LEASE_S))
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "service.run", "--bundle", str(bundle), "--port", "0",
             "--state", str(tmp_path / "state"), "--datasets", str(datasets),
             "--worker", "embedded", "--evaluation-lease-s", lease_s],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready: http://"), log.read_text()
            yield Running(line.split()[1], process, log)
        finally:
            process.kill()


def by_hand(
    protocol: str, settings: dict[str, Any], bundle: Path, labelled: Path, tmp_path: Path
) -> Any:
    """The report of the same evaluation without server, queue and worker."""
    job = {
        "protocol": protocol,
        "bundle": str(bundle),
        "dataset": {"name": "shades", "kind": "folder", "root": str(labelled)},
        "settings": settings,
        "seed": SEED,
        "device": "cpu",
        "workers": 0,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run(
        [sys.executable, "-m", "trainer.evaluate", "--job", str(tmp_path / "job.json"),
         "--output", str(tmp_path / "by hand")],
        cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=400,
    )  # fmt: skip
    return json.loads((tmp_path / "by hand" / "report.json").read_text())


@pytest.mark.timeout(600)
def test_evaluation__outlives_its_worker_and_equals_one_run_by_hand(
    service: Running, bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    where = service.submit("knn", KNN)
    found = until(where, lambda found: found["status"] != "queued")
    assert found["status"] == "running", found
    killed = worker_of(service.process.pid)
    while not (evaluating := killed.children(recursive=True)):
        threading.Event().wait(0.02)  # leased, and not begun yet
    killed.send_signal(signal.SIGKILL)
    found = until(where, lambda _: False)
    assert found["status"] == "succeeded", found
    assert found["attempts"] == 2
    page = httpx2.get(f"{where}/report", timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    assert "sandbox" in page.headers["content-security-policy"]
    assert "shades" in page.text
    _, left = psutil.wait_procs(evaluating, timeout=10)
    assert left == []
    below = psutil.Process(service.process.pid).children(recursive=True)
    service.process.terminate()
    assert service.process.wait(40) == 0, service.log.read_text()
    _, left = psutil.wait_procs(below, timeout=10)
    assert left == []

    expected = by_hand("knn", KNN, bundle, labelled, tmp_path)
    assert found["report"]["results"] == expected["results"]
    assert found["report"]["model_id"] == expected["model_id"] == open_bundle(bundle).model_id


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", [30], indirect=True, ids=["lease of 30 s"])
def test_fine_tuning__that_is_killed_begins_anew_and_equals_one_run_by_hand(
    service: Running, bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    where = service.submit("semi_supervised", FINE_TUNING)

    def training(attempts: int) -> psutil.Process:
        """The child of this attempt, in the middle of its epochs."""
        found = until(
            where,
            lambda found: (
                found["attempts"] == attempts
                and found["status"] == "running"
                and (found["progress"] or {}).get("stage") == STAGE
            ),
        )
        assert found["status"] == "running", found
        child = child_of(worker_of(service.process.pid))
        assert child is not None
        return child

    killed = [training(1)]
    killed[0].send_signal(signal.SIGKILL)
    killed.append(training(2))
    killed[1].send_signal(signal.SIGTERM)  # by somebody, not by its worker
    killed.append(training(3))
    worker_of(service.process.pid).send_signal(signal.SIGTERM)  # which is no attempt
    psutil.wait_procs(killed, timeout=30)
    killed.append(training(3))
    found = until(where, lambda _: False)
    assert (found["status"], found["attempts"]) == ("succeeded", 3), found
    _, left = psutil.wait_procs(killed, timeout=10)
    assert left == []

    expected = by_hand("semi_supervised", FINE_TUNING, bundle, labelled, tmp_path)
    for part in ("results", "curves", "facts"):
        assert found["report"][part] == expected[part]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", [60], indirect=True, ids=["lease of 60 s"])
def test_cancel__does_not_wait_for_the_lease_of_a_frozen_worker(service: Running) -> None:
    where = service.submit("semi_supervised", FINE_TUNING)
    until(where, lambda found: found["status"] == "running")
    frozen = worker_of(service.process.pid)
    while (child := child_of(frozen)) is None:
        threading.Event().wait(0.02)
    frozen.suspend()
    httpx2.delete(where, timeout=30)
    found = until(where, lambda _: False)
    assert found["status"] == "cancelled"
    assert found["finished_at"] < found["started_at"] + 60  # not by the end of its lease
    frozen.resume()  # it finds that the job is nobody's any more
    _, left = psutil.wait_procs([child], timeout=30)
    assert left == []
    again = until(service.submit("knn", KNN), lambda _: False)
    assert again["status"] == "succeeded", again
