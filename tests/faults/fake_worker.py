"""A worker whose evaluations are done by tests/service/fake_evaluate.py: everything else is real.

Run: celery -A tests.faults.fake_worker worker -Q cpu, with the environment of service.worker, and
FAKE_STUCK_S, FAKE_SWEEP_S in place of its constants. With FAKE_DEAF=1 it stays connected to its
broker and takes no message, as Celery was seen to do after a broker had come back.
"""

import os
import sys
from pathlib import Path
from typing import Any

from celery import signals

from service.arguments import settings_from_environment
from service.jobs import SWEEP_S
from service.worker import STUCK_S, make

FAKE = Path(__file__).parents[1] / "service" / "fake_evaluate.py"

app = make(
    settings_from_environment(),
    command=(sys.executable, str(FAKE)),
    stuck_s=float(os.environ.get("FAKE_STUCK_S", STUCK_S)),
    sweep_s=float(os.environ.get("FAKE_SWEEP_S", SWEEP_S)),
)


def go_deaf(sender: Any, **_: Any) -> None:
    sender.task_consumer.cancel()


if os.environ.get("FAKE_DEAF") == "1":
    signals.worker_ready.connect(go_deaf, weak=False)
