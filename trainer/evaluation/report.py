"""What is said of an evaluation: report.json, the same shape for every protocol.

In: the job, what was evaluated, the outcome. Out: plain values, without paths of the machine.
"""

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from trainer.evaluation.context import Evaluation
from trainer.evaluation.job import Job
from trainer.evaluation.labelled import LabelledDataset
from trainer.evaluation.outcome import CONFIDENCE, Mistake, Outcome, Result
from trainer.report import versions

SCHEMA = "invprop.evaluation/1"


def report_of(
    evaluation: Evaluation,
    job: Job,
    outcome: Outcome,
    *,
    encoder: Mapping[str, Any],
    durations_s: Mapping[str, float],
) -> dict[str, Any]:
    """All of report.json."""
    first = outcome.results[0]
    return {
        "schema": SCHEMA,
        "job_id": job.job_id,
        "protocol": job.protocol,
        "seed": job.seed,
        "settings": job.as_dict()["settings"],
        "model_id": evaluation.bundle.model_id,
        "encoder": {**evaluation.bundle.manifest["recipe"]["encoder"], **encoder},
        "dataset": _dataset(evaluation),
        "headline": {
            "result": first.name,
            "metric": outcome.headline,
            "value": first.metrics[outcome.headline],
            "interval": list(first.intervals[outcome.headline])
            if outcome.headline in first.intervals
            else None,
            "untrained": (first.untrained or {}).get(outcome.headline),
            "gain": list(first.gains[outcome.headline])
            if outcome.headline in first.gains
            else None,
        },
        "confidence": CONFIDENCE,
        "results": [_result(each, evaluation.dataset) for each in outcome.results],
        "curves": [
            {
                "title": curve.title,
                "unit": curve.unit,
                "x": curve.x_name,
                "lines": {
                    name: [list(at) for at in points] for name, points in curve.lines.items()
                },
            }
            for curve in outcome.curves
        ],
        "facts": dict(outcome.facts),
        "durations_s": {name: round(value, 3) for name, value in durations_s.items()},
        "environment": _environment(evaluation),
    }


def _dataset(evaluation: Evaluation) -> dict[str, Any]:
    dataset = evaluation.dataset
    return {
        "name": dataset.name,
        "kind": dataset.kind,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "splits": {name: len(split) for name, split in dataset.splits.items()},
        "divided_by_seed": dataset.divided_by_seed,
        "skipped": {
            name: [{"id": file.id, "reason": file.reason} for file in files]
            for name, files in evaluation.skipped.items()
        },
    }


def _result(result: Result, dataset: LabelledDataset) -> dict[str, Any]:
    return {
        "name": result.name,
        "metrics": dict(result.metrics),
        "intervals": {name: list(ends) for name, ends in result.intervals.items()},
        "untrained": None if result.untrained is None else dict(result.untrained),
        "gains": {name: list(ends) for name, ends in result.gains.items()},
        "per_class": [dict(row) for row in result.per_class],
        "confusion": None if result.confusion is None else result.confusion.tolist(),
        "mistakes": [_mistake(each, dataset) for each in result.mistakes],
        "facts": dict(result.facts),
    }


def _mistake(mistake: Mistake, dataset: LabelledDataset) -> dict[str, Any]:
    return {
        "id": dataset.test.source.ids[mistake.row],
        "row": mistake.row,
        "label": dataset.class_names[mistake.label],
        "predicted": dataset.class_names[mistake.predicted],
        "margin": mistake.margin,
    }


def _environment(evaluation: Evaluation) -> dict[str, Any]:
    device = evaluation.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **versions(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }
