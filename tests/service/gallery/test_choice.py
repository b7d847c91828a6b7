"""service.gallery.choice: by number, by memory, by what was measured."""

import pytest

from service.gallery.choice import Choice, Kind, Policy, memory_bytes

LOTS = 10**12


@pytest.mark.parametrize(
    ("items", "allowed_bytes", "kind", "fits"),
    [
        (1000, LOTS, "flat", True),
        (1001, LOTS, "hnsw", True),
        (1000, 511_999, "flat-fp16", True),  # 1000 x 128 x 4 bytes would be 512,000
        (1000, 255_999, "flat-fp16", False),
        (2000, 2000 * (512 + 272) - 1, "ivf", True),
        (2000, 1000, "ivf", False),
    ],
)
def test_choose__by_items_and_memory(
    items: int, allowed_bytes: int, kind: Kind, fits: bool
) -> None:
    choice = Policy(allowed_bytes, exact_items=1000).choose(items, 128)
    assert (choice.kind, choice.fits) == (kind, fits)
    assert choice.is_exact == (items <= 1000)
    assert (choice.effort > 0) != choice.is_exact


def test_choose__takes_what_was_measured_where_it_fits() -> None:
    tuned = Choice("hnsw", 37)
    assert Policy(LOTS, exact_items=9, tuned=tuned).choose(10, 128) == tuned
    small = Policy(memory_bytes("hnsw", 10, 128) - 1, exact_items=9, tuned=tuned)
    assert small.choose(10, 128).kind == "ivf"
    # So few items are searched exactly, whatever was measured when they were more.
    assert Policy(LOTS, exact_items=10, tuned=tuned).choose(10, 128).kind == "flat"


def test_choose__takes_the_gpus_graph_where_there_is_one() -> None:
    assert Policy(LOTS, exact_items=10, cagra=True).choose(11, 128).kind == "cagra"
