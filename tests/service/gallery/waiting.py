"""Waiting for what another thread does, and for how long at most."""

import time
from collections.abc import Callable

WAIT_S = 30


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
