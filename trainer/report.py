"""What is said of a run afterwards: in report.json, and in the training summary of its bundle.

In: the survey of the data, the metrics. Out: plain values. The bundle's summary holds no times, so
that the same run exports the same bundle again.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from trainer.checkpoint import Progress
from trainer.config import Recipe
from trainer.datasets import ImageSource
from trainer.decoding import Survey
from trainer.run_folder import Metrics

PACKAGES = ("invprop", "torch", "torchvision", "numpy", "pillow", "onnx", "onnxruntime-gpu")


def data_facts(found: Survey, *, train: ImageSource, held_out: ImageSource) -> dict[str, Any]:
    """What was found, what is trained on, what is left out and why."""
    return {
        "images_found": len(found.source) + len(found.skipped),
        "images_trained_on": len(train),
        "images_held_out": len(held_out),
        "images_skipped": len(found.skipped),
        "skipped": [dataclasses.asdict(file) for file in found.skipped],
        "other_files": found.source.other_files,
        "labels": train.labels is not None,
        "held_in_memory": found.stored is not None,
        "fingerprint": found.source.fingerprint,
    }


def training_facts(metrics: Sequence[Metrics]) -> dict[str, Any]:
    """First and last kNN accuracy (None where there are no labels), last losses, collapse."""
    accuracies = [line["knn"] for line in metrics if "knn" in line]
    trained = [line for line in metrics if line["epoch"] > 0]
    last = trained[-1] if trained else {}
    return {
        "epochs": len(trained),
        "instance_loss": last.get("instance"),
        "invariance_loss": last.get("invariance"),
        "knn_untrained": accuracies[0] if accuracies else None,
        "knn_trained": accuracies[-1] if len(accuracies) > 1 else None,
        "collapsed_epochs": [line["epoch"] for line in trained if line["collapsed"]],
    }


def extensions(
    before: Mapping[str, Any] | None, saved: Progress | None, recipe: Recipe
) -> list[dict[str, Any]]:
    """When a run was given more epochs: from there on its learning rate follows the new length.

    Args:
        before: the run's report so far.
        saved: what the run goes on from; None at its beginning.
    """
    if saved is None:
        return []
    planned = saved.recipe["epochs"]
    found: list[dict[str, Any]] = [
        each
        for each in (before or {}).get("extended", [])
        # One that had no checkpoint yet when the run was stopped is found again below.
        if each["to_epochs"] <= planned
    ]
    if planned < recipe.epochs:
        found.append(
            {
                "from_epochs": planned,
                "to_epochs": recipe.epochs,
                "after_epoch": saved.position.epoch,
                "after_step": saved.position.step,
            }
        )
    return found


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
