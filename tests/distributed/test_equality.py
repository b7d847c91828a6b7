"""Any number of ranks computes the same, with a whole bank on each or with its rows divided.

Losses, graph rows, bank and weights, ties included; stopped and resumed too. All runs are made by
one program, for starting Python with torch takes longer than they do.

Run: pytest tests/distributed/test_equality.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from trainer.checkpoint import checkpoints

# 5 steps of 8 of 41 images in each of 2 epochs; the second one has both losses.
SMALL = (
    "epochs=2",
    "batch_size=8",
    "data.holdout=0",
    "encoder.image_size_px=8",
    "encoder.dim=8",
    "bank.num_neighbours=2",
    "loss.num_background=16",
    "loss.steps=2",
    "loss.num_positives=4",
    "loss.warmup_epochs=1",
    "optim.lr=0.001",  # rounding grows from step to step, the faster the more is learnt
    "augment.flip=0.5",
    "augment.jitter=0.5",
    "augment.blur=0.5",
    "augment.hue=0.1",
)
DIVIDED = "bank.sharded=true"
JOBS: tuple[dict[str, Any], ...] = (
    {"name": "whole-1", "size": 1},
    {"name": "whole-2", "size": 2},
    {"name": "whole-4", "size": 4},
    {"name": "divided-1", "size": 1, "overrides": [DIVIDED]},
    {"name": "divided-2", "size": 2, "overrides": [DIVIDED]},
    {"name": "divided-4", "size": 4, "overrides": [DIVIDED]},
    {"name": "official-1", "size": 1, "overrides": ["loss.mode=official"]},
    {"name": "official-divided-2", "size": 2, "overrides": ["loss.mode=official", DIVIDED]},
    {"name": "own-statistics", "size": 2, "overrides": ["distributed.sync_batchnorm=false"]},
    {"name": "cut-whole-2", "size": 2, "stops_after": 6},
    {"name": "resumed-whole-2", "size": 2, "goes_on_from": "cut-whole-2"},
    {"name": "cut-2", "size": 2, "overrides": [DIVIDED], "stops_after": 6},
    {"name": "resumed-2", "size": 2, "overrides": [DIVIDED], "goes_on_from": "cut-2"},
    {"name": "resumed-1", "size": 1, "goes_on_from": "cut-2"},
    {"name": "cut-1", "size": 1, "stops_after": 6},
    {"name": "resumed-4", "size": 4, "overrides": [DIVIDED], "goes_on_from": "cut-1"},
)
ROUNDING = 1e-5
GRADIENT_ROUNDING = 1e-4  # of the length of a layer's gradient
# name of a job -> what each of its ranks held at the end
Runs = Callable[[str], list[dict[str, Any]]]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start_for_module: Callable[..., Any]) -> Path:
    """Where all jobs were done."""
    folder = tmp_path_factory.mktemp("equality")
    draw = np.random.default_rng(0)
    # Of several sizes, so that views depend on the image they are drawn for.
    images = draw.integers(0, 256, (41, 11, 9, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", images=images)
    jobs = [job | {"overrides": [*SMALL, *job.get("overrides", [])]} for job in JOBS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = str(Path(__file__).with_name("some_steps.py"))
    words = [str(folder / "images.npz"), str(folder), str(folder / "jobs.json")]
    process = start_for_module([program, *words])
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return folder


@pytest.fixture
def runs(folder: Path) -> Runs:
    def load(name: str) -> list[dict[str, Any]]:
        (size,) = (job["size"] for job in JOBS if job["name"] == name)
        return [
            torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)
        ]

    return load


def _compare_close(some: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in some.items():
        torch.testing.assert_close(others[name], value, rtol=ROUNDING, atol=ROUNDING)


def _same(one: dict[str, Any], other: dict[str, Any], *parts: str) -> None:
    for part in parts:
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("whole-2", "whole-1"),
        ("whole-4", "whole-1"),
        ("divided-2", "whole-1"),
        ("divided-4", "whole-1"),
        ("official-divided-2", "official-1"),
    ],
)
def test_ranks__compute_what_one_process_computes(runs: Runs, name: str, alone: str) -> None:
    (one,), ranks = runs(alone), runs(name)
    assert (one["neighbours"].sum(dim=1) > 0).sum() >= 40  # an image may be left over
    assert one["lines"][1]["invariance"] > 0.1
    first = ranks[0]
    for each in ranks:
        # Among the ranks to the last bit; they differ in nothing but what they computed.
        assert each["lines"] == first["lines"]
        assert torch.equal(each["neighbours"], first["neighbours"])
        _same(each, first, "encoder", "momenta")
        assert each["layers"] == one["layers"]  # torch's own stand there again
    # To one process: sums over shares are added in another order, so not to the last bit ...
    torch.testing.assert_close(first["losses"], one["losses"], rtol=0, atol=ROUNDING)
    for line, wanted in zip(first["lines"], one["lines"], strict=True):
        assert line == pytest.approx(wanted, rel=ROUNDING, abs=ROUNDING)
    _compare_close(one["encoder"], first["encoder"])
    _compare_close(one["bank"], first["bank"])
    # The last bias is taken away again by the normalisation after it: its gradient is noise.
    one["momenta"].pop("head.2.bias", None)
    for name, value in one["momenta"].items():
        off = (first["momenta"][name] - value).norm() / value.norm()
        assert off < GRADIENT_ROUNDING, (name, off)
    # ... but ids are ids, and of two equal rows the lower one everywhere.
    assert torch.equal(first["neighbours"], one["neighbours"])
    joined = torch.cat([each["nearest"] for each in ranks], dim=1)
    assert torch.equal(joined, one["nearest"])


def test_divided__by_one_process_is_the_whole_bank(runs: Runs) -> None:
    (one,), (other,) = runs("whole-1"), runs("divided-1")
    assert one["lines"] == other["lines"]
    _same(one, other, "bank", "encoder", "momenta")


@pytest.mark.parametrize("size", [2, 4])
def test_divided__holds_the_same_rows_as_whole_banks_to_the_last_bit(runs: Runs, size: int) -> None:
    whole, divided = runs(f"whole-{size}"), runs(f"divided-{size}")
    held = [row for each in divided for row in each["held"]]
    assert held == list(range(41))
    # The first step writes embeddings of equal weights: the hash of the bank is the same. After it
    # the weights are equal to rounding.
    hashes = torch.stack([each["digests"] for each in divided]).sum(dim=0)
    for each in whole:
        assert hashes[0] == each["digests"][0]
    assert len(set(hashes.tolist())) == len(hashes)


def test_divided__is_saved_as_a_whole_bank(runs: Runs, folder: Path) -> None:
    for name in ("whole-2", "divided-2", "divided-4"):
        newest = checkpoints(folder / f"{name}-checkpoints")[0]
        saved = safetensors.torch.load_file(newest / "bank.safetensors")
        assert saved["embeddings"].shape == (41, 8)
        _same({"bank": saved}, runs(name)[0], "bank")


@pytest.mark.parametrize(
    ("name", "cut", "resumed"),
    [("divided-2", "cut-2", "resumed-2"), ("whole-2", "cut-whole-2", "resumed-whole-2")],
)
def test_resumed__is_the_uninterrupted_run_to_the_last_bit(
    runs: Runs, name: str, cut: str, resumed: str
) -> None:
    _check_resumed(runs(name), runs(cut), runs(resumed))


def _check_resumed(
    whole: list[dict[str, Any]], cut: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> None:
    done = len(cut[0]["losses"])
    assert done == 7  # asked after the sixth step, agreed on in the seventh
    for one, stopped, other in zip(whole, cut, resumed, strict=True):
        losses = torch.cat([stopped["losses"], other["losses"]])
        assert torch.equal(losses, one["losses"])
        assert torch.equal(torch.cat([stopped["digests"], other["digests"]]), one["digests"])
        assert other["lines"] == one["lines"]
        assert torch.equal(other["neighbours"], one["neighbours"])
        _same(one, other, "encoder", "momenta")
    _same(whole[0], resumed[0], "bank")


@pytest.mark.parametrize(("name", "cut"), [("resumed-1", "cut-2"), ("resumed-4", "cut-1")])
def test_resumed__with_other_processes_and_division_is_the_same_to_rounding(
    runs: Runs, name: str, cut: str
) -> None:
    (one,), ranks, (stopped, *_) = runs("whole-1"), runs(name), runs(cut)
    losses = torch.cat([stopped["losses"], ranks[0]["losses"]])
    torch.testing.assert_close(losses, one["losses"], rtol=0, atol=ROUNDING)
    for each in ranks:
        assert torch.equal(each["neighbours"], one["neighbours"])
    _compare_close(one["bank"], ranks[0]["bank"])
    _compare_close(one["encoder"], ranks[0]["encoder"])


def test_batch_norm__of_each_share_leaves_the_ranks_equal_but_for_its_statistics(
    runs: Runs,
) -> None:
    one, other = runs("own-statistics")
    assert one["lines"] == other["lines"]
    assert torch.equal(one["digests"], other["digests"])
    assert torch.equal(one["neighbours"], other["neighbours"])
    _same(one, other, "momenta")
    mean = "backbone.1.running_mean"
    assert not torch.equal(one["encoder"][mean], other["encoder"][mean])
