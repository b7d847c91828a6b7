"""kNN accuracy on images placed by hand, and the signs of collapse.

Run: pytest tests/trainer/test_monitor.py
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import EncoderConfig, MonitorConfig
from trainer.datasets import open_source, split
from trainer.decode_pool import DecodePool
from trainer.encoder import build_encoder
from trainer.monitor import KnnMonitor, build_knn_monitor, is_collapsed, spread
from trainer.representation.preprocess import InputContract

CPU = torch.device("cpu")
CONTRACT = InputContract(size_px=8)


def _encoder() -> object:
    torch.manual_seed(0)
    return build_encoder(
        EncoderConfig(backbone="small", image_size_px=8, head="linear", dim=8, normalise=False)
    )


def _colours(*values: int) -> np.ndarray:
    """Images of one colour each: red above 0, blue below."""
    images = np.zeros((len(values), 8, 8, 3), np.uint8)
    for image, value in zip(images, values, strict=True):
        image[:, :, 0 if value > 0 else 2] = abs(value)
    return images


def _config(**changes: object) -> MonitorConfig:
    values: dict[str, object] = {
        "every_epochs": 1,
        "knn_k": 3,
        "knn_temperature": 0.07,
        "knn_on": "embedding",
        "max_images": 100,
        "max_anchors": 0,
        "collapse_patience": 2,
    }
    return MonitorConfig.model_validate(values | changes)


def _monitor(labels: list[int], *, queries: bool) -> KnnMonitor:
    gallery = _colours(200, 210, -200, -210)
    return KnnMonitor(
        gallery=gallery,
        gallery_labels=np.array([0, 0, 1, 1]),
        queries=_colours(205, -205, 203, -207) if queries else None,
        query_labels=np.array(labels),
        k=1,
    )


def test_knn__held_out_images_against_training_images() -> None:
    encoder = _encoder()
    assert _monitor([0, 1, 0, 1], queries=True).measure(encoder, CPU) == 1.0
    assert _monitor([0, 1, 1, 0], queries=True).measure(encoder, CPU) == 0.5


def test_knn__leaves_the_image_itself_out() -> None:
    # Without itself each image is nearest to the other of its colour.
    assert _monitor([0, 0, 1, 1], queries=False).measure(_encoder(), CPU) == 1.0
    alone = KnnMonitor(_colours(200, -200), np.array([0, 1]), None, np.array([0, 1]), k=1)
    assert alone.measure(_encoder(), CPU) == 0.0


def test_knn__votes_weigh_by_the_temperature() -> None:
    # Nearest to the query is one image of class 0, farther are two of class 1.
    images = _colours(200, -200, -210)
    labels, query = np.array([0, 1, 1]), _colours(201)
    encoder = _encoder()
    by_temperature = [
        KnnMonitor(images, labels, query, np.array([0]), k=3, temperature=temperature).measure(
            encoder, CPU
        )
        for temperature in (0.01, 10.0)
    ]
    assert by_temperature == [1.0, 0.0]


def test_knn__on_features_asks_the_backbone() -> None:
    encoder = _encoder()
    for parameter in encoder.head.parameters():  # type: ignore[attr-defined]
        torch.nn.init.zeros_(parameter)  # the head has nothing to say any more
    labels = np.array([1, 1, 0, 0])
    gallery = _colours(200, 210, -200, -210)
    queries, answers = _colours(205, -205), np.array([1, 0])
    on = {
        name: KnnMonitor(
            gallery, labels, queries, answers, k=1, on_features=name == "features"
        ).measure(encoder, CPU)
        for name in ("embedding", "features")
    }
    assert on["features"] == 1.0
    assert on["embedding"] < 1.0


def test_monitor__of_a_source_without_labels(packed: Callable[..., Path]) -> None:
    source = open_source(str(packed(labels=False)))
    with DecodePool(0) as pool:
        nothing = source.subset([])
        assert build_knn_monitor(source, nothing, _config(), CONTRACT, pool, seed=0) is None


def test_monitor__looks_at_a_bounded_number_of_images(packed: Callable[..., Path]) -> None:
    source = open_source(str(packed(40)))
    with DecodePool(0) as pool:
        nothing = source.subset([])
        made = build_knn_monitor(source, nothing, _config(max_images=10), CONTRACT, pool, seed=0)
        assert made is not None
        assert made.gallery.shape == (10, 8, 8, 3)
        few = build_knn_monitor(
            source,
            nothing,
            _config(max_images=10, knn_k=200, knn_temperature=0.1, knn_on="features"),
            CONTRACT,
            pool,
            seed=0,
        )
        assert few is not None
        assert (few.temperature, few.on_features) == (0.1, True)
        assert (made.temperature, made.on_features) == (0.07, False)
        assert few.k == 9  # all but the image itself
        assert (few.gallery == made.gallery).all()


def test_monitor__with_a_hold_out(packed: Callable[..., Path]) -> None:
    source = open_source(str(packed(40)))
    train, held = split(source.labels, 40, holdout=0.25, seed=0)
    with DecodePool(0) as pool:
        made = build_knn_monitor(
            source.subset(train), source.subset(held), _config(knn_k=200), CONTRACT, pool, seed=0
        )
    assert made is not None
    assert made.queries is not None
    assert (made.queries == source.prepared(held, CONTRACT)).all()
    assert (made.gallery == source.prepared(train, CONTRACT)).all()
    assert made.k == 30


def test_spread__by_hand() -> None:
    # Cosines among 0, 90 and 180 degrees: 0, -1, 0, each twice.
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert float(spread(rows)) == pytest.approx(math.sqrt(2) / 3)
    assert float(spread(torch.ones(4, 2) / math.sqrt(2))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "spread_of", "verdict"),
    [
        (6.238, 0.001, True),  # ln 512 = 6.2383: every similarity equal
        (
            15.10,
            0.0076,
            True,
        ),  # digits, linear head, tau 0.07: the embeddings leave the bank behind
        (7.48, 0.0165, True),  # two epochs later
        (6.238, 0.088, False),  # as random directions: training has only begun
        (7.26, 0.244, False),  # digits as its recipe says, first epoch
        (6.10, 0.001, False),
        (4.0, 0.3, False),
    ],
)
def test_collapse__needs_both_signs(loss: float, spread_of: float, verdict: bool) -> None:
    for num_background, num_images in ((512, 1348), (4096, 512)):
        found = is_collapsed(
            loss, spread_of, num_background=num_background, num_images=num_images, dim=128
        )
        assert found == verdict
