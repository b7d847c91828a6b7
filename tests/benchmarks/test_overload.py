"""The short form of overload.py: the excess is refused, nothing hangs, afterwards all is normal."""

from pathlib import Path

import numpy as np

from tests.benchmarks.overload import open_loop
from tests.benchmarks.wire import closed_loop, npy, request
from tests.faults.started import Started
from tests.service.conftest import SIDE, build_bundle

SEED = 3


def test_overload__excess_is_refused_and_nothing_hangs(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle")
    pixels = np.zeros((256, SIDE, SIDE, 3), np.uint8)
    wire = request(npy(pixels), "application/x-npy")
    with Started(
        bundle,
        tmp_path / "state",
        log=tmp_path / "log",
        inference_threads=1,
        decoder_processes=1,
        max_batch=1,  # each image its own run: slow enough to be overrun
        queue_size=512,  # two requests
    ) as service:
        flood = open_loop(service.port, wire, rate=200, seconds=1, seed=SEED)
        after = closed_loop(service.port, [wire], connections=1, seconds=0.5)  # all 200
    assert set(flood.statuses) == {200, 429}
    assert flood.statuses[429] > flood.statuses[200] / 4
    assert (flood.hung, flood.without_retry_after) == (0, 0)
    assert after.answers > 0
