"""Describe a labelled data set: python -m trainer.evaluation.describe --dataset FILE [--images]

In: a JSON file with the `dataset` of a job. Out: one JSON object on standard output,
{"description": {task, classes, class_names, counts, ...}} or {"error": {code, message}}; with
--images every image is decoded, as an evaluation would, and the broken ones are told. Exit code 0,
2 for what the caller can put right. No torch is loaded, but by torchvision for its own sets.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.datasets import DataError
from trainer.decode_pool import DecodePool
from trainer.decoding import prepared_or_reasons
from trainer.evaluation.datasets import open_dataset
from trainer.evaluation.job import JobError, load_dataset
from trainer.evaluation.labelled import LabelledDataset, LabelledSplit
from trainer.representation.preprocess import InputContract

SEED = 0  # of what is divided by seed: the counts are the same for every one
NAMED = 1000  # classes that are named
TOLD = 20  # broken images of a split that are told one by one
NICE = 10  # whoever asks has something better to do
_CONTRACT = InputContract(size_px=32)  # small: whether it can be decoded is all that is asked


def main(argv: Sequence[str] | None = None) -> int:
    """Describe, and turn every error that a person can act on into one object."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.describe", description="Describe a labelled data set."
    )
    parser.add_argument("--dataset", required=True, type=Path, metavar="FILE", help="a JSON object")
    parser.add_argument("--images", action="store_true", help="decode every image")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes; 0: none beside")
    parser.add_argument("--memory-bytes", type=int, metavar="N", help="address space, at most")
    given = parser.parse_args(argv)
    os.nice(NICE)
    if given.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (given.memory_bytes, given.memory_bytes))
    try:
        dataset = open_dataset(load_dataset(given.dataset), seed=SEED)
        answer = {"description": described(dataset)}
        if given.images:
            answer["description"]["broken"] = broken(dataset, workers=given.workers)
    except JobError as error:
        return _fail("job_invalid", str(error))
    except DataError as error:
        return _fail("dataset_invalid", str(error))
    except ModuleNotFoundError as error:
        return _fail(
            "trainer_missing",
            f"this kind of data set needs {error.name}, which is not installed: install the "
            "trainer here too, or register another kind",
        )
    except OSError as error:
        return _fail("dataset_invalid", f"it cannot be read: {error}")
    _say(answer)
    return 0


def described(dataset: LabelledDataset) -> dict[str, Any]:
    """What is known of a data set without opening an image, as plain values."""
    several = any(split.targets is not None for split in dataset.splits.values())
    return {
        "task": "multi_label" if several else "single_label",
        "classes": len(dataset.class_names),
        "class_names": list(dataset.class_names[:NAMED]),
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "divided_by_seed": dataset.divided_by_seed,
        "max_skipped": dataset.max_skipped,
        "fingerprint": dataset.fingerprint,
    }


def broken(dataset: LabelledDataset, *, workers: int) -> dict[str, dict[str, Any]]:
    """For each split with broken images: their `count`, and the `first` with their reasons."""
    with DecodePool(workers) as pool:
        found = {name: _reasons(split, pool) for name, split in dataset.splits.items()}
    return {
        name: {"count": len(reasons), "first": reasons[:TOLD]}
        for name, reasons in found.items()
        if reasons
    }


def _reasons(split: LabelledSplit, pool: DecodePool) -> list[dict[str, str]]:
    answers = zip(split.source.ids, prepared_or_reasons(split.source, _CONTRACT, pool), strict=True)
    return [{"id": name, "reason": answer} for name, answer in answers if isinstance(answer, str)]


def _fail(code: str, message: str) -> int:
    _say({"error": {"code": code, "message": message}})
    return 2


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.exit(main())
