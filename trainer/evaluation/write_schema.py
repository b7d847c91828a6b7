"""Write service/evaluation_job.schema.json: what a job may hold, for programs without the trainer.

Run: python -m trainer.evaluation.write_schema. In: the models of trainer.evaluation.job and its
parts, the single source. Out: their JSON Schema (draft 2020-12), of which the service checks
settings and registered data sets. A test fails when the checked-in copy has drifted from the
models.
"""

import json
from pathlib import Path

from trainer.evaluation.job import job_schema

CHECKED_IN = Path(__file__).parents[2] / "service" / "evaluation_job.schema.json"


def document() -> bytes:
    """The schema of a job, compact and sorted, so that equal models are equal bytes."""
    text = json.dumps(job_schema(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


if __name__ == "__main__":
    CHECKED_IN.write_bytes(document())
