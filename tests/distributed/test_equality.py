"""World sizes 1, 2 and 4 compute the same: losses, graph rows, bank and weights, ties included.

Run: pytest tests/distributed/test_equality.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# 5 steps of 8 images in each of 2 epochs; the second one has both losses.
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
ROUNDING = 1e-5
GRADIENT_ROUNDING = 1e-4  # of the length of a layer's gradient
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tmp_path: Path, start: Callable[..., Any], free_port: Callable[[], int]) -> Train:
    """Train with `size` processes; what each of them holds at the end."""
    images = tmp_path / "images.npz"
    draw = np.random.default_rng(0)
    # Of several sizes, so that views depend on the image they are drawn for.
    np.savez(images, images=draw.integers(0, 256, (40, 11, 9, 3)).astype(np.uint8))

    def run(size: int, *overrides: str) -> list[dict[str, Any]]:
        output = tmp_path / f"with-{size}"
        program = str(Path(__file__).with_name("some_steps.py"))
        words = [program, str(images), str(output), *SMALL, *overrides]
        port = free_port()
        started = [start(words, rank=rank, size=size, port=port) for rank in range(size)]
        for process in started:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
        return [torch.load(f"{output}-{rank}.pt") for rank in range(size)]

    return run


def _compare_close(some: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in some.items():
        torch.testing.assert_close(others[name], value, rtol=ROUNDING, atol=ROUNDING)


def test_world_sizes__compute_the_same(train: Train) -> None:
    (one,) = train(1)
    assert (one["bank"]["neighbours"] >= 0).all()
    assert one["lines"][1]["invariance"] > 0.1
    for size in (2, 4):
        ranks = train(size)
        for each in ranks:
            # Among the ranks to the last bit; they differ in nothing but what they computed.
            assert each["lines"] == ranks[0]["lines"]
            for part in ("bank", "encoder"):
                for name, value in each[part].items():
                    assert torch.equal(value, ranks[0][part][name]), name
            assert each["layers"] == one["layers"]  # torch's own stand there again
        first = ranks[0]
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
        assert torch.equal(first["bank"]["neighbours"], one["bank"]["neighbours"])
        joined = torch.cat([each["nearest"] for each in ranks], dim=1)
        assert torch.equal(joined, one["nearest"])


def test_batch_norm__of_each_share_leaves_the_ranks_equal_but_for_its_statistics(
    train: Train,
) -> None:
    one, other = train(2, "distributed.sync_batchnorm=false")
    assert one["lines"] == other["lines"]
    for name, value in one["bank"].items():
        assert torch.equal(value, other["bank"][name]), name
    for name, value in one["momenta"].items():
        assert torch.equal(value, other["momenta"][name]), name
    mean = "backbone.1.running_mean"
    assert not torch.equal(one["encoder"][mean], other["encoder"][mean])
