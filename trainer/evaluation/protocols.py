"""The table of protocols, and what holds for all of them.

In: an evaluation and its job. Out: the protocol's outcome, after the trained encoder was found to
have the bits that it had before.
"""

from typing import Any

from trainer.evaluation.context import Evaluation, state_digest
from trainer.evaluation.detection import detection
from trainer.evaluation.job import (
    DetectionJob,
    Job,
    KnnJob,
    LinearProbeJob,
    SemiSupervisedJob,
    TransferJob,
    Voc07Job,
)
from trainer.evaluation.knn import knn
from trainer.evaluation.linear_probe import linear_probe
from trainer.evaluation.outcome import EvaluationError, Outcome
from trainer.evaluation.semi_supervised import semi_supervised
from trainer.evaluation.transfer import transfer
from trainer.evaluation.voc07 import voc07_svm


def run_protocol(evaluation: Evaluation, job: Job) -> tuple[Outcome, dict[str, Any]]:
    """Run a job's protocol.

    Returns:
        the outcome, and what the report says of the encoder's bits.

    Raises:
        EvaluationError: the protocol changed the trained encoder.
    """
    before = state_digest(evaluation.trained.encoder)
    outcome = _run(evaluation, job)
    after = state_digest(evaluation.trained.encoder)
    if before != after:
        raise EvaluationError(
            f"{job.protocol} changed the encoder that it evaluates: its figures are worthless; "
            "this is a defect of the protocol"
        )
    return outcome, {"sha256_before": before, "sha256_after": after}


def _run(evaluation: Evaluation, job: Job) -> Outcome:
    if isinstance(job, KnnJob):
        return knn(evaluation, job.settings)
    if isinstance(job, LinearProbeJob):
        return linear_probe(evaluation, job.settings)
    if isinstance(job, Voc07Job):
        return voc07_svm(evaluation, job.settings)
    if isinstance(job, SemiSupervisedJob):
        return semi_supervised(evaluation, job.settings)
    if isinstance(job, TransferJob):
        return transfer(evaluation, job.settings)
    if isinstance(job, DetectionJob):
        return detection(evaluation, job.settings)
    raise EvaluationError(f"there is no protocol {job.protocol!r} yet")
