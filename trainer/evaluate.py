"""Evaluate a bundle on a labelled data set.

    python -m trainer.evaluate --job job.json --output DIR

In: a job, see trainer/evaluation/job.py and trainer/README.md. Out: DIR/report.html, DIR/job.json
with every default, and DIR/report.json, which is written whole and last. On standard output a JSON
object a line: {"stage", "done", "total"} while it goes on, and at its end {"report"} or {"error"}.
Exit code 0; 2 for what the caller can put right; 1 for an evaluation that failed; 130 or 143 after
Ctrl-C or SIGTERM. This file is the door, an evaluation reads in trainer/evaluation/session.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.datasets import DataError
from trainer.evaluation.job import JobError, load_job
from trainer.host_memory import keep_freed_memory

SUCCEEDED, FAILED, WRONG_USE = 0, 1, 2
INTERRUPTED, TERMINATED = 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and turn every error that a person can act on into one line with a stable code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Evaluate an exported encoder on a labelled data set.",
    )
    parser.add_argument("--job", required=True, type=Path, metavar="FILE", help="what to evaluate")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="where the report will stand"
    )
    arguments = parser.parse_args(argv)
    try:
        job = load_job(arguments.job)
    except JobError as error:
        return _fail("job_invalid", str(error), WRONG_USE)
    keep_freed_memory()  # blocks of similarities are asked for again and again
    # Imported here: the decoding processes are spawned, import this file anew, and would each pay
    # seconds and hundreds of megabytes for torch.
    from trainer.evaluation.outcome import EvaluationError
    from trainer.evaluation.session import evaluate
    from trainer.interruption import Terminated, terminable
    from trainer.representation.artifact import ArtifactError
    from trainer.representation.bundle import BundleError
    from trainer.request import UnavailableError
    from trainer.run_folder import OutputError

    try:
        with terminable():
            report = evaluate(job, arguments.output)
    except JobError as error:
        return _fail("job_invalid", str(error), WRONG_USE)
    except DataError as error:
        return _fail("dataset_invalid", str(error), WRONG_USE)
    except BundleError as error:
        return _fail("bundle_invalid", str(error), WRONG_USE)
    except UnavailableError as error:
        return _fail("device_unavailable", str(error), WRONG_USE)
    except OutputError as error:
        return _fail("output_taken", str(error), WRONG_USE)
    except (EvaluationError, ArtifactError) as error:
        return _fail("evaluation_failed", str(error), FAILED)
    except OSError as error:
        return _fail("storage_failed", f"{error}: put this right and run the job again", FAILED)
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return _fail("interrupted", "interrupted; no report was written", code)
    _say({"report": str(report)})
    return SUCCEEDED


def _fail(code: str, message: str, exit_code: int) -> int:
    _say({"error": {"code": code, "message": message}})
    sys.stderr.write(f"error: {message}\n")
    return exit_code


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
