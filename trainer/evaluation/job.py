"""What an evaluation is asked to do: pydantic models of job.json, read once at the door.

In: a JSON file. Out: a frozen `Job`, or `JobError` that names the key, the value and what is
allowed. Its data set is a model of trainer.evaluation.dataset_specs, its settings are one of
trainer.evaluation.protocol_settings; each default stands once, in these three files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from trainer.evaluation.dataset_specs import DatasetSpec
from trainer.evaluation.protocol_settings import (
    DetectionSettings,
    KnnSettings,
    LinearProbeSettings,
    SemiSupervisedSettings,
    TransferSettings,
    Voc07Settings,
)
from trainer.evaluation.section import Section

Parsed = TypeVar("Parsed")


class JobError(ValueError):
    """A job that cannot be run as it is written; says which key, what it is, what is allowed."""


class _Job(Section):
    """What all jobs have."""

    bundle: Path
    dataset: DatasetSpec
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # scikit-learn takes no larger one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"  # decoding processes
    cache: Path | None = None  # frozen features are kept there; None: below the output folder

    def as_dict(self) -> dict[str, Any]:
        """The job as plain values, every default filled in."""
        return self.model_dump(mode="json")

    @property
    def job_id(self) -> str:
        """sha256 (hex) of all that decides the numbers, and where the data lie."""
        values = {k: v for k, v in self.as_dict().items() if k not in ("workers", "cache")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class KnnJob(_Job):
    """`knn`: nothing is trained."""

    protocol: Literal["knn"]
    settings: KnnSettings = KnnSettings()


class LinearProbeJob(_Job):
    """`linear_probe`: a linear classifier on frozen features."""

    protocol: Literal["linear_probe"]
    settings: LinearProbeSettings = LinearProbeSettings()


class Voc07Job(_Job):
    """`voc07_svm`: several classes an image, mean average precision."""

    protocol: Literal["voc07_svm"]
    settings: Voc07Settings = Voc07Settings()


class SemiSupervisedJob(_Job):
    """`semi_supervised`: the whole network, a share of the labels."""

    protocol: Literal["semi_supervised"]
    settings: SemiSupervisedSettings = SemiSupervisedSettings()


class TransferJob(_Job):
    """`transfer`: the whole network or one layer, all labels of a target set."""

    protocol: Literal["transfer"]
    settings: TransferSettings = TransferSettings()


class DetectionJob(_Job):
    """`detection`: objects with boxes, average precision."""

    protocol: Literal["detection"]
    settings: DetectionSettings = DetectionSettings()


# A further protocol adds its job here, and its function in trainer.evaluation.protocols.
Job = KnnJob | LinearProbeJob | Voc07Job | SemiSupervisedJob | TransferJob | DetectionJob
_JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="protocol")])
_DATASET: TypeAdapter[DatasetSpec] = TypeAdapter(DatasetSpec)


def load_job(path: Path) -> Job:
    """Read a job.

    Raises:
        JobError: no JSON, an unknown or missing key, a value out of range.
    """
    return parse_job(_load(path, "a job"))


def load_dataset(path: Path) -> DatasetSpec:
    """Read the `dataset` of a job alone.

    Raises:
        JobError: as `load_job`.
    """
    return _parsed(_DATASET, _load(path, "a data set"))


def parse_job(values: Mapping[str, Any]) -> Job:
    """Check plain values against the models.

    Raises:
        JobError: names each wrong key.
    """
    return _parsed(_JOB, values)


def _load(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(values, dict):
        raise JobError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ; else nobody knew which value was meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:64]!r} twice; say it once")
    return values


def _parsed(model: TypeAdapter[Parsed], values: Mapping[str, Any]) -> Parsed:
    try:
        return model.validate_python(values)
    except ValidationError as error:
        raise JobError(
            "; ".join(_explain(problem) for problem in error.errors(include_url=False))
        ) from None


def job_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of job.json: one definition for each protocol and kind of set."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_JOB.json_schema()}


def _explain(problem: Any) -> str:
    # A union adds the tag of its branch to the location; no field is called like a tag.
    tags = {"knn", "linear_probe", "voc07_svm", "semi_supervised", "transfer", "detection"} | {
        "folder",
        "npz",
        "torchvision",
        "table",
        "voc",
        "cub200",
        "list",
        "webdataset",
    }
    key = ".".join(str(part) for part in problem["loc"] if part not in tags)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key!r}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f"={problem['input']!r}"
    return f"{key or 'the job'}{shown}: {message}"
