"""/evaluations, and the data sets that may be evaluated on (GET /datasets)."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.schemas.fields import Strict

Status = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]


class EvaluationRequest(Strict):
    """What to evaluate the served encoder on, and how."""

    protocol: str = Field(
        min_length=1,
        max_length=64,
        description="`knn`, `linear_probe`, `semi_supervised`, `transfer`, `voc07_svm` or "
        "`detection`.",
    )
    dataset: str = Field(min_length=1, max_length=64, description="A name of GET /datasets.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Of the protocol; trainer/README.md lists them."
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: Literal["cpu", "cuda"] | None = Field(
        default=None, description="Null: a GPU for `detection`, the CPU for all others."
    )


class EvaluationProgress(BaseModel):
    """How far it is."""

    stage: str
    done: float
    total: float


class EvaluationError(BaseModel):
    """Why it failed."""

    code: str
    message: str
    log: str | None = Field(default=None, description="The last lines that its process wrote.")


class EvaluationAnswer(BaseModel):
    """One evaluation. Times are seconds since 1970."""

    id: str
    status: Status
    protocol: str
    dataset: str
    settings: dict[str, Any]
    seed: int
    model: str = Field(description="model_id of the encoder that is evaluated.")
    queue: Literal["cpu", "gpu"]
    waiting_for: str | None = Field(description="What is missing, where it is queued in vain.")
    progress: EvaluationProgress | None
    attempts: int = Field(description="Of at most 3.")
    created_at: float
    started_at: float | None
    finished_at: float | None
    report: dict[str, Any] | None = Field(
        description="Once it has succeeded: report.json. Null in lists and events."
    )
    error: EvaluationError | None


class EvaluationList(BaseModel):
    """One page, the newest first."""

    items: list[EvaluationAnswer]
    next: str | None = Field(description="`cursor` of the next page; null on the last one.")


class DatasetAnswer(BaseModel):
    """A labelled data set that the operator registered."""

    name: str = Field(description="What an evaluation names it by.")
    kind: str
    state: Literal["counting", "ready", "failed"] = Field(
        description="`counting`: it is being opened in the background; ask again."
    )
    task: Literal["single_label", "multi_label"] | None = Field(
        description="Whether its images have one class each, or several. Null unless ready."
    )
    classes: int | None = Field(description="Their number. Null unless ready.")
    class_names: list[str] | None = Field(description="The first 1,000.")
    counts: dict[str, int] | None = Field(
        description="Images of each split: train, test, perhaps validation. Null unless ready."
    )
    divided_by_seed: bool | None = Field(
        description="It has no test split of its own: an evaluation's seed divides it."
    )
    fingerprint: str | None = Field(description="sha256 of what it holds, as reports name it.")
    problem: str | None = Field(description="Why it cannot be evaluated on, where failed.")


class DatasetList(BaseModel):
    """The registered data sets, by name."""

    items: list[DatasetAnswer]
    problem: str | None = Field(
        description="Why the last change of the file was not taken over; null where it was."
    )
    next: str | None = Field(description="Always null: they are few.")
