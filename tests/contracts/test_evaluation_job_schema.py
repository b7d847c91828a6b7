"""The job's schema that the service checks with is the trainer's models, and judges as they do."""

import json
from typing import Any

import jsonschema_rs
import pytest

from trainer.evaluation.job import JobError, parse_job
from trainer.evaluation.write_schema import CHECKED_IN, document

FOLDER = {"name": "birds", "kind": "folder", "root": "/data"}
VALIDATOR = jsonschema_rs.Draft202012Validator(json.loads(CHECKED_IN.read_bytes()))


def job(**values: Any) -> dict[str, Any]:
    return {"protocol": "knn", "bundle": "/bundle", "dataset": FOLDER, **values}


def test_schema__is_the_checked_in_one() -> None:
    assert CHECKED_IN.read_bytes() == document(), "run: python -m trainer.evaluation.write_schema"


@pytest.mark.parametrize(
    "good",
    [
        job(),
        job(seed=3, settings={"k": [1, 20], "outputs": ["features"]}),
        job(protocol="linear_probe", settings={"classifier": "lbfgs", "c": [0.1]}),
        job(dataset={**FOLDER, "splits": {"train": "a", "test": "b"}}),
        job(dataset={**FOLDER, "kind": "torchvision", "set": "cifar10"}),
        job(dataset={**FOLDER, "kind": "voc", "class_names": ["a", "b"]}),
    ],
)
def test_schema__admits_what_the_models_admit(good: dict[str, Any]) -> None:
    parse_job(good)
    assert VALIDATOR.is_valid(good)


@pytest.mark.parametrize(
    "bad",
    [
        job(protocol="guess"),
        job(settings={"k": [0]}),
        job(settings={"kk": [1]}),
        job(seed=2**32),
        job(dataset={**FOLDER, "splits": {"training": "a"}}),
        job(dataset={**FOLDER, "test_share": 1}),
        job(dataset={**FOLDER, "kind": "torchvision", "set": "nowhere"}),
        job(dataset={**FOLDER, "kind": "list"}),
        job(dataset={**FOLDER, "name": "../birds"}),
        job(dataset={**FOLDER, "label": "x"}),
    ],
)
def test_schema__refuses_what_the_models_refuse(bad: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        parse_job(bad)
    assert not VALIDATOR.is_valid(bad)
