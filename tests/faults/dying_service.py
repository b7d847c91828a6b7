"""A service that dies between an evaluation's row and its message.

Run: python -m tests.faults.dying_service, with the environment of service.worker. In: nothing. Out:
one more evaluation in the table, no message for it, and an end by SIGKILL.
"""

import os
import signal
import sys
from collections.abc import Sequence

from service.arguments import settings_from_environment
from service.datasets import open_registry
from service.doorbell import Doorbell, celery_application
from service.evaluations import Evaluations
from service.metrics import Metrics
from trainer.representation.bundle import open_bundle


class Deadly(Doorbell):
    """Whoever rings is gone."""

    def ring(self, job_id: str, queue: str) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    def ring_all(self, jobs: Sequence[tuple[str, str]]) -> None:
        """The sweep has written down that it rang, and has not."""


def main() -> int:
    """Accept one evaluation, and die of it."""
    settings = settings_from_environment()
    application = celery_application(settings.state, settings.broker_url(), limit_s=600)
    evaluations = Evaluations(
        settings, open_registry(settings.datasets), Metrics(), doorbell=Deadly(application)
    )
    model = open_bundle(settings.bundle).model_id
    evaluations.submit("knn", "set", {}, 0, device=None, model=model, key=None)
    evaluations.close()  # waits for the bell, which is the end
    return 1


if __name__ == "__main__":
    sys.exit(main())
