"""What is watched while training: the kNN accuracy of the embeddings, and signs of collapse.

In: the encoder with un-augmented images, or the figures of an epoch. Out: an accuracy, a verdict.
Labels are read here and nowhere else in training.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import MonitorConfig
from trainer.datasets import ImageSource
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all
from trainer.distributed import ALONE, Ranks
from trainer.encoder import Encoder, embed_images
from trainer.representation.preprocess import InputContract
from trainer.representation.protocols import KNN_TEMPERATURE, knn_accuracy

EMBEDDED_TOGETHER = 64  # images in one forward pass

# Collapse: the instance loss tells no image from another better than chance, ln of how many compete
# (it may be far worse: while all embeddings turn together they leave the bank behind) ...
COLLAPSE_LOSS_MARGIN = 0.02  # within this share of it, or above
# ... and all embeddings of a batch are equally similar. Similarities of directions drawn at random
# in D dimensions differ by 1 / sqrt(D); collapsed digits runs showed 0.008 to 0.025 at D = 128,
# healthy ones 0.24 and more.
COLLAPSE_SPREAD = 0.5  # of the random directions' spread


@dataclass(frozen=True)
class KnnMonitor:
    """Weighted kNN accuracy on images as the service will see them.

    Held-out images are asked against training images; without held-out ones, training images
    against each other, none voting on itself. Each rank embeds and asks its share.
    """

    gallery: NDArray[np.uint8]  # (N, S, S, 3), this rank's share of them
    gallery_labels: NDArray[np.int64]  # (N,)
    queries: NDArray[np.uint8] | None  # (Q, S, S, 3), this rank's share; None: leave one out
    query_labels: NDArray[np.int64]  # (Q,)
    k: int
    temperature: float = KNN_TEMPERATURE
    on_features: bool = False  # of the backbone, instead of the head's embeddings
    ranks: Ranks = ALONE

    def measure(
        self,
        encoder: Encoder,
        device: torch.device,
        go_on: Callable[[], object] = lambda: None,
    ) -> float:
        """The share of images, 0..1, whose neighbours vote for their own class.

        Args:
            go_on: called before every few images, equally often on all ranks; it may raise.
        """
        embed = functools.partial(self._embed, encoder, device, go_on)
        # Running statistics of a share of each batch differ between the ranks.
        self.ranks.copy_from_first(list(encoder.buffers()))
        gallery = np.concatenate(self.ranks.gathered(embed(self.gallery, len(self.gallery_labels))))
        own = self.ranks.share(len(self.query_labels))
        if self.queries is None:
            queries, exclude = gallery[own], np.arange(len(gallery))[own]
        else:
            queries, exclude = embed(self.queries, len(self.query_labels)), None
        right = 0
        if len(queries):
            accuracy = knn_accuracy(
                queries,
                self.query_labels[own],
                gallery,
                self.gallery_labels,
                k=self.k,
                temperature=self.temperature,
                exclude=exclude,
            )
            right = round(accuracy * len(queries))
        return sum(self.ranks.gathered(right)) / len(self.query_labels)

    def _embed(
        self,
        encoder: Encoder,
        device: torch.device,
        go_on: Callable[[], object],
        images: NDArray[np.uint8],
        count: int,
    ) -> NDArray[np.float32]:
        """(N, S, S, 3), this rank's share of `count` -> (N, F or D) of unit length."""
        # As often as the rank with the largest share has to.
        rounds = math.ceil(math.ceil(count / self.ranks.size) / EMBEDDED_TOGETHER)

        def batches() -> Iterator[NDArray[np.uint8]]:
            for first in range(0, rounds * EMBEDDED_TOGETHER, EMBEDDED_TOGETHER):
                go_on()
                if first < len(images):
                    yield images[first : first + EMBEDDED_TOGETHER]

        features, embeddings = embed_images(encoder, batches(), device)
        if not self.on_features:
            return embeddings
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return np.asarray(features / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def build_knn_monitor(
    train: ImageSource,
    held_out: ImageSource,
    config: MonitorConfig,
    contract: InputContract,
    pool: DecodePool,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> KnnMonitor | None:
    """Prepare the images the monitor looks at, at most `config.max_images` on either side.

    Returns:
        None where there are no labels.
    """
    if train.labels is None:
        return None
    shown = _some(train, config.max_images, seed)
    asked = _some(held_out, config.max_images, seed)
    assert shown.labels is not None
    assert asked.labels is not None  # both come from one source
    leave_one_out = len(asked) == 0

    def prepared(source: ImageSource) -> NDArray[np.uint8]:
        return prepare_all(
            source.subset(np.arange(len(source))[ranks.share(len(source))]), contract, pool
        )

    return KnnMonitor(
        gallery=prepared(shown),
        gallery_labels=shown.labels,
        queries=None if leave_one_out else prepared(asked),
        query_labels=shown.labels if leave_one_out else asked.labels,
        k=min(config.knn_k, len(shown) - leave_one_out),
        temperature=config.knn_temperature,
        on_features=config.knn_on == "features",
        ranks=ranks,
    )


def spread(embeddings: Tensor) -> Tensor:
    """Standard deviation, 0-d, of the similarities among the (B, D) embeddings of a batch."""
    rows = embeddings.detach().float()
    count = len(rows)
    # All but the diagonal, without a mask: its entries stand count + 1 apart, the first one first.
    others = (rows @ rows.T).flatten()[1:].view(count - 1, count + 1)[:, :-1]
    return others.std(correction=0)


def is_collapsed(
    instance_loss: float,
    similarity_spread: float,
    *,
    num_background: int,
    num_images: int,
    dim: int,
) -> bool:
    """Whether an epoch's mean figures say that all images look alike to the encoder."""
    chance = math.log(min(num_background, num_images))
    no_better = instance_loss >= (1 - COLLAPSE_LOSS_MARGIN) * chance
    return no_better and similarity_spread < COLLAPSE_SPREAD / math.sqrt(dim)


def _some(source: ImageSource, count: int, seed: int) -> ImageSource:
    if len(source) <= count:
        return source
    drawn = np.random.default_rng([seed, count]).permutation(len(source))[:count]
    return source.subset(np.sort(drawn))
