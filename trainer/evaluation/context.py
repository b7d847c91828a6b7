"""What every protocol is given, and the encoders it may ask for.

In: a verified bundle. Out: its network in torch, in evaluation mode, and an untrained twin. The
weights are read from encoder.safetensors and not from the ONNX graph: blocks inside the network can
be pooled, a GPU can be used, the untrained twin and fine-tuning run the same code, and bits can be
compared. The graph's answers are the same within the bundle's parity, see tests.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError

from trainer.config import EncoderConfig
from trainer.datasets import Skipped
from trainer.decode_pool import DecodePool
from trainer.encoder import Encoder, build_encoder
from trainer.evaluation.labelled import LabelledDataset
from trainer.representation.bundle import WEIGHTS, Bundle, BundleError

# stage, done, total: called often, cheap
ProgressReport = Callable[[str, int, int], None]


class Network(NamedTuple):
    """An encoder on the device, in evaluation mode, and what names its answers in the cache."""

    encoder: Encoder
    key: str  # the model_id, or what an untrained twin was drawn from


@dataclass(frozen=True)
class Evaluation:
    """All that a protocol may use besides its settings.

    A protocol is a function `(Evaluation, settings) -> Outcome`. It never changes `trained`: what
    is fine-tuned is a copy (`fresh_copy`), and the bits are compared before and after.

    Attributes:
        bundle: verified.
        trained: the bundle's encoder.
        dataset: its splits; what is learned or chosen comes from `train` and `validation` alone.
        seed: the only source of randomness, a part of the report.
        device: where the encoder runs.
        pool: decodes pictures.
        cache: folder of frozen features.
        progress: told what is being done.
        skipped: broken images by split, filled in as they are found.
    """

    bundle: Bundle
    trained: Network
    dataset: LabelledDataset
    seed: int
    device: torch.device
    pool: DecodePool
    cache: Path
    progress: ProgressReport = lambda stage, done, total: None
    skipped: dict[str, tuple[Skipped, ...]] = field(default_factory=dict)

    def untrained(self) -> Network:
        """A network of the same architecture whose weights were drawn from the seed."""
        config = encoder_config(self.bundle)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = build_encoder(config)
        drawn = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
        return Network(
            encoder.to(self.device).eval(), f"untrained-{drawn}-{torch.__version__}-{self.seed}"
        )

    def skip(self, split: str, files: Sequence[Skipped]) -> None:
        """Remember broken images of a split, each once."""
        known = self.skipped.get(split, ())
        ids = {file.id for file in known}
        self.skipped[split] = (*known, *(file for file in files if file.id not in ids))

    def fresh_copy(self) -> Encoder:
        """The trained encoder to be fine-tuned; the original stays as it is."""
        return copy.deepcopy(self.trained.encoder)


def encoder_config(bundle: Bundle) -> EncoderConfig:
    """How the bundle's encoder is built.

    Raises:
        BundleError: its recipe does not say, or as this version does not know it.
    """
    try:
        return EncoderConfig.model_validate(bundle.manifest["recipe"]["encoder"])
    except (KeyError, TypeError, ValidationError) as error:
        raise BundleError(
            f"{bundle.directory} does not say how its encoder is built ({error}): export it again"
        ) from error


def open_network(bundle: Bundle, device: torch.device) -> Network:
    """The bundle's encoder with its weights.

    Raises:
        BundleError: no weights, or those of another encoder.
    """
    encoder = build_encoder(encoder_config(bundle))
    try:
        encoder.load_state_dict(safetensors.torch.load(bundle.read(WEIGHTS)))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"{bundle.directory / WEIGHTS} does not hold the weights of this encoder: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Network(encoder.to(device).eval(), bundle.model_id)


def state_digest(encoder: Encoder) -> str:
    """sha256 (hex) over the names and bits of all weights and statistics."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
