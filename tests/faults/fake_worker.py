"""A worker whose evaluations are done by tests/service/fake_evaluate.py: everything else is real.

Run: celery -A tests.faults.fake_worker worker -Q cpu, with the environment of service.worker.
"""

import os
import sys
from pathlib import Path

from service.settings import Settings
from service.worker import STUCK_S, make

FAKE = Path(__file__).parents[1] / "service" / "fake_evaluate.py"

app = make(
    Settings(),  # type: ignore[call-arg]  # the environment gives the rest
    command=(sys.executable, str(FAKE)),
    stuck_s=float(os.environ.get("FAKE_STUCK_S", STUCK_S)),
)
