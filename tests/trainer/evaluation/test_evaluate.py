"""The command: exit codes, lines of progress, the report, what is refused.

Run: pytest tests/trainer/evaluation/test_evaluate.py
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation import session

Run = Callable[..., tuple[int, list[dict[str, Any]], Path]]


def test_evaluate__writes_a_report_and_says_what_it_does(run_job: Run) -> None:
    code, lines, output = run_job(seed=3)
    assert code == 0
    assert lines[-1] == {"report": str(output / "report.json")}
    stages = [line["stage"] for line in lines[:-1]]
    assert stages[0] == "opening"
    assert stages[-1] == "report"
    assert {"frozen features of train", "frozen features of test"} <= set(stages)
    last = {line["stage"]: (line["done"], line["total"]) for line in lines[:-1]}
    assert all(done == total for done, total in last.values()), last
    report = json.loads((output / "report.json").read_text())
    assert report["protocol"] == "knn"
    assert report["seed"] == 3
    assert report["dataset"]["splits"] == {"train": 60, "test": 30}
    assert report["encoder"]["sha256_before"] == report["encoder"]["sha256_after"]
    assert [each["name"] for each in report["results"]][:2] == [
        "embedding, k=200",
        "embedding, k=20",
    ]
    first = report["results"][0]
    assert report["headline"]["value"] == first["metrics"]["top1"]
    low, high = first["intervals"]["top1"]
    assert low <= first["metrics"]["top1"] <= high
    assert first["untrained"]["top1"] >= 0
    resolved = json.loads((output / "job.json").read_text())
    assert resolved["settings"]["temperature"] == 0.07


def test_evaluate__again_gives_the_same_numbers_and_another_job_is_refused(run_job: Run) -> None:
    _, _, output = run_job()
    before = json.loads((output / "report.json").read_text())
    assert run_job()[0] == 0
    after = json.loads((output / "report.json").read_text())
    assert before["results"] == after["results"]
    code, lines, _ = run_job(seed=1)
    assert code == 2
    assert lines[-1]["error"]["code"] == "output_taken"
    assert json.loads((output / "report.json").read_text()) == after


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"protocol": "guess"}, "guess"),
        ({"surprise": 1}, "there is no key 'surprise'"),
        ({"settings": {"k": [0]}}, "settings.k.0=0"),
        ({"settings": {"k": [5, 5]}}, "k names something twice"),
        ({"settings": {"temperature": 0}}, "settings.temperature=0"),
        ({"dataset": {"name": "x", "kind": "ftp", "root": "."}}, "kind"),
        ({"dataset": {"name": "../x", "kind": "npz", "root": "."}}, "dataset.name='../x'"),
    ],
)
def test_job__that_cannot_be_run(run_job: Run, values: dict[str, Any], said: str) -> None:
    code, lines, output = run_job(**values)
    assert code == 2
    (line,) = lines
    assert line["error"]["code"] == "job_invalid"
    assert said in line["error"]["message"]
    assert not output.exists()


def test_job__of_a_gpu_where_there_is_none(run_job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, lines, _ = run_job(device="cuda")
    assert code == 2
    assert lines[-1]["error"]["code"] == "device_unavailable"


def test_job__without_a_bundle(run_job: Run, tmp_path: Path) -> None:
    code, lines, _ = run_job(bundle=str(tmp_path / "nothing"))
    assert code == 2
    assert lines[-1]["error"]["code"] == "bundle_invalid"


def test_report__is_written_last_and_not_at_all_by_what_fails(
    run_job: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "report_of", lambda *a, **k: full())
    code, lines, output = run_job()
    assert code == 1
    assert lines[-1]["error"]["code"] == "storage_failed"
    assert not (output / "report.json").exists()


def test_sigterm__ends_it_without_a_report(
    bundle_directory: Path, packed_folder: Path, tmp_path: Path
) -> None:
    dataset = {"name": "set", "kind": "npz", "root": str(packed_folder)}
    job = {"protocol": "knn", "bundle": str(bundle_directory), "dataset": dataset}
    (tmp_path / "job.json").write_text(json.dumps(job))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "trainer.evaluate", "--job", str(tmp_path / "job.json")]
    process = subprocess.Popen(
        [*command, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["stage"] == "opening"
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "interrupted"
    assert not (output / "report.json").exists()
