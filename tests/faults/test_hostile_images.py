"""Odd pictures are embedded as what they show; hostile ones cost only themselves."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.hostile_images import MOST_BYTES, SLOWEST_S, attack
from tests.faults.odd_images import odd_pictures
from tests.service.conftest import SIDE
from trainer.representation.preprocess import InputContract, fit, prepare

SEED = 11


@pytest.mark.parametrize("size_px", [SIDE, 32])
def test_odd_pictures__are_what_they_show(size_px: int) -> None:
    contract = InputContract(size_px=size_px, jpeg_draft=False)
    names = set()
    for odd in odd_pictures(SEED):
        names.add(odd.name)
        wanted = fit(Image.fromarray(odd.pixels), contract).astype(int)
        got = prepare(odd.content, contract).astype(int)
        assert np.abs(got - wanted).max() <= odd.tolerance, odd.name
    assert len(names) == 54


@pytest.mark.parametrize(
    "images", [300, pytest.param(10_000, marks=pytest.mark.long)], ids=["some", "all"]
)
def test_hostile_pictures__cost_only_themselves(images: int, tmp_path: Path) -> None:
    figures = attack(tmp_path, images=images, seed=SEED)
    sys.stdout.write(f"seed {SEED}: {figures}\n")
    assert figures.failures == []
    assert sum(figures.statuses.values()) == images
    assert set(figures.statuses) <= {200, 413, 415, 422, 429}
    assert figures.statuses[422] > images / 3
    assert figures.honest > 10
    assert figures.grown_bytes <= MOST_BYTES
    if images > 1000:  # the long form is not run beside other tests
        assert figures.slowest_s <= SLOWEST_S, figures.slowest
