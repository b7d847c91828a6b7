"""A pool whose one process works on something that kills it, when it is told to."""

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from trainer.decode_pool import DecodePool

_DELAY_S = 0.5  # for whoever is to be left waiting by then


def occupy(pool: DecodePool, directory: Path) -> Path:
    """Fill a pool of one process: what comes from here on waits in it.

    Args:
        pool: with one process that has nothing to do.
        directory: an empty one.

    Returns:
        What is to be made (`touch`) for the process to die, half a second later.
    """
    assert pool.workers == 1
    pool.submit(_die_once_told, directory)
    while not (directory / "begun").exists():
        time.sleep(0.01)
    # The queue of an executor takes one for each process, and one.
    queued: list[Future[Any]] = [pool.submit(abs, -1), pool.submit(abs, -1)]
    while not all(future.running() for future in queued):
        time.sleep(0.01)
    return directory / "told"


def _die_once_told(directory: Path) -> None:
    (directory / "begun").touch()
    while not (directory / "told").exists():
        time.sleep(0.01)
    time.sleep(_DELAY_S)
    os._exit(3)
