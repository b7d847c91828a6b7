"""One evaluation from its job to its report.

In: a job and a folder. Out: job.json, report.html and, last, report.json in that folder; progress
on standard output. What is half done when it ends early leaves no report behind.
"""

import json
import sys
import time
from pathlib import Path

from trainer.decode_pool import DecodePool
from trainer.distributed import ALONE
from trainer.evaluation.context import Evaluation, open_network
from trainer.evaluation.datasets import open_dataset
from trainer.evaluation.job import Job
from trainer.evaluation.page import evaluation_page, mistake_thumbnails
from trainer.evaluation.protocols import run_protocol
from trainer.evaluation.report import report_of
from trainer.representation.bundle import open_bundle
from trainer.request import resolve_device
from trainer.run_folder import OutputError, write_whole

REPORT, PAGE, JOB, CACHE = "report.json", "report.html", "job.json", "features"
SAID_EVERY_S = 0.5  # at most so often within a stage


class ProgressLines:
    """A JSON line for each stage as it begins, now and then within it, and at its end."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}
        self._stage, self._began, self._said = "", time.monotonic(), 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begins = stage != self._stage
        if begins:
            self.end()
            self._stage, self._began = stage, now
        if begins or done >= total or now - self._said >= SAID_EVERY_S:
            self._said = now
            line = {"stage": stage, "done": done, "total": total}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()

    def end(self) -> None:
        """Count the running stage."""
        if self._stage:
            spent = self.durations_s.get(self._stage, 0.0) + time.monotonic() - self._began
            self.durations_s[self._stage] = spent
        self._stage = ""


def evaluate(job: Job, output: Path) -> Path:
    """Run a job; an older report of the same job is replaced at the very end.

    Raises:
        JobError, DataError, BundleError, UnavailableError, OutputError: what was asked for cannot
            be; says what to change.
        EvaluationError, OSError: it failed.
    """
    began = time.monotonic()
    progress = ProgressLines()
    progress("opening", 0, 1)
    _check_output(job, output)
    device = resolve_device(job.device, ALONE)
    bundle = open_bundle(job.bundle)
    dataset = open_dataset(job.dataset, seed=job.seed)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / JOB, json.dumps(job.as_dict(), indent=1) + "\n")
    with DecodePool(job.workers) as pool:
        evaluation = Evaluation(
            bundle=bundle,
            trained=open_network(bundle, device),
            dataset=dataset,
            seed=job.seed,
            device=device,
            pool=pool,
            cache=job.cache or output / CACHE,
            progress=progress,
        )
        progress("opening", 1, 1)
        outcome, encoder = run_protocol(evaluation, job)
        progress("report", 0, 1)
        progress.end()
        report = report_of(
            evaluation,
            job,
            outcome,
            encoder=encoder,
            durations_s={**progress.durations_s, "all": time.monotonic() - began},
        )
        shown = mistake_thumbnails(evaluation, outcome)
    write_whole(output / PAGE, evaluation_page(report, shown))
    write_whole(output / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    progress("report", 1, 1)
    return output / REPORT


def _check_output(job: Job, output: Path) -> None:
    """A folder with another job's report is not written over."""
    path = output / REPORT
    if not path.exists():
        return
    try:
        older = json.loads(path.read_bytes()).get("job_id")
    except (OSError, ValueError, AttributeError):
        older = None
    if older != job.job_id:
        raise OutputError(
            f"{path} is the report of another job: give another --output, or remove it"
        )
