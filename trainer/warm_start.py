"""Beginning a new run with the weights of another one: the encoder's, and nothing else.

In: a bundle. Out: an encoder with its weights, and a bank filled with what that encoder says of the
new run's images. Optimiser, graph and count of epochs begin anew.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from trainer.checkpoint import TrainingState
from trainer.config import EncoderConfig
from trainer.datasets import ImageSource
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all
from trainer.distributed import Ranks
from trainer.encoder import Encoder, build_encoder, embed_images
from trainer.representation.bundle import WEIGHTS, Bundle, BundleError, open_bundle
from trainer.representation.preprocess import InputContract

# Images that each rank embeds between two exchanges, and in one forward pass.
FILLED_TOGETHER, EMBEDDED_TOGETHER = 256, 64


class WarmStartError(Exception):
    """Weights that this run cannot begin with; the message says what differs."""


class WarmStart(NamedTuple):
    """A bundle that fits."""

    bundle: Path
    model_id: str


def open_warm_start(directory: Path, config: EncoderConfig) -> WarmStart:
    """Check that the weights of a bundle are those of an encoder that `config` describes.

    Raises:
        WarmStartError: no whole bundle, or one of another encoder.
    """
    bundle, found = _open(directory)
    theirs = bundle.manifest["recipe"].get("encoder", {})
    differing = [
        f"encoder.{name} is {theirs.get(name)} in the bundle, {value} in the recipe"
        for name, value in config.model_dump(mode="json").items()
        if theirs.get(name) != value
    ]
    if differing:
        raise WarmStartError(
            f"--warm-start {directory}: {'; '.join(differing)}. Give the bundle's values, or begin "
            "without its weights"
        )
    with torch.device("meta"):
        wanted = build_encoder(config).state_dict()
    wrong = [
        name
        for name in sorted({*wanted, *found})
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    ]
    if wrong:
        raise WarmStartError(
            f"--warm-start {directory}: {len(wrong)} of its weights, first {wrong[0]!r}, are not "
            "those of this version's encoder; export the bundle again, or begin without it"
        )
    return WarmStart(directory.absolute(), bundle.model_id)


def load_weights(start: WarmStart, encoder: Encoder) -> None:
    """Give an encoder the weights and statistics of a bundle.

    Raises:
        WarmStartError: the bundle is gone, damaged or another one by now.
    """
    try:
        bundle, weights = _open(start.bundle)
        if bundle.model_id != start.model_id:
            raise WarmStartError(f"{start.bundle} is the bundle {bundle.model_id}")
    except WarmStartError as error:
        raise WarmStartError(
            f"the run begins with the weights of the bundle {start.model_id}: give --warm-start "
            f"and where that lies ({error})"
        ) from error
    encoder.load_state_dict(weights)


def fill_bank(
    state: TrainingState,
    images: ImageSource,
    contract: InputContract,
    pool: DecodePool,
    *,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Write into each row of the bank what the encoder says of that image, un-augmented.

    Rows in random directions would pull a trained encoder apart for an epoch. Each rank embeds its
    share of a block; all write the same rows.
    """
    bank, encoder = state.bank, state.encoder
    inertia, bank.momentum = bank.momentum, 0.0
    together = FILLED_TOGETHER * ranks.size
    for first in range(0, len(images), together):
        begin = first + FILLED_TOGETHER * ranks.rank
        own = images.subset(range(begin, min(begin + FILLED_TOGETHER, len(images))))
        prepared = prepare_all(own, contract, pool)
        parts = (
            prepared[at : at + EMBEDDED_TOGETHER] for at in range(0, len(own), EMBEDDED_TOGETHER)
        )
        rows = np.zeros((FILLED_TOGETHER, encoder.embedding_dim), np.float32)  # shares are alike
        rows[: len(own)] = embed_images(encoder, parts, device)[1]
        (joined,) = ranks.joined(torch.from_numpy(rows).to(device))
        indices = torch.arange(first, min(first + together, len(images)), device=device)
        bank.update(indices, joined[: len(indices)])
    bank.momentum = inertia


def _open(directory: Path) -> tuple[Bundle, dict[str, Tensor]]:
    try:
        bundle = open_bundle(directory)
        return bundle, safetensors.torch.load(bundle.read(WEIGHTS))
    except (BundleError, OSError, safetensors.SafetensorError) as error:
        raise WarmStartError(
            f"--warm-start wants the bundle of a finished run, and {directory} cannot be opened "
            f"as one: {error}"
        ) from error
