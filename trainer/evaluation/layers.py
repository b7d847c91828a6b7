"""Outputs of an encoder by name: its features, its embedding, or a block pooled to a small grid.

In: an encoder and names. Out: a function from images to float32 rows for each name. `layer4.1` is a
block pooled to the paper's grid, `layer4.1@2` the same pooled to 2 x 2.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.encoder import Encoder
from trainer.evaluation.job import JobError

EMBEDDING, FEATURES, BLOCKS = "embedding", "features", "blocks"
# The authors pool each block to at most so many numbers: 64 channels to 12 x 12, 256 to 6 x 6, ...
POOLED_NUMBERS = 9216
_LAYER = re.compile(r"(?P<block>[a-z0-9.]+)(@(?P<grid>[1-9][0-9]?))?")

Encode = Callable[[Tensor], dict[str, Tensor]]


def blocks_of(encoder: Encoder) -> dict[str, nn.Module]:
    """The blocks of the backbone by name, the first one first: `stem`, `layer1.0`, ..."""
    backbone = encoder.backbone
    if hasattr(backbone, "layer1"):  # a ResNet
        found: dict[str, nn.Module] = {"stem": backbone.get_submodule("maxpool")}
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for number, block in enumerate(backbone.get_submodule(stage).children()):
                found[f"{stage}.{number}"] = block
        return found
    activations = [module for module in backbone.children() if isinstance(module, nn.ReLU)]
    return {f"block{number}": module for number, module in enumerate(activations, 1)}


def expanded(encoder: Encoder, names: Sequence[str]) -> tuple[str, ...]:
    """The names with `blocks` replaced by all blocks; each is known to the encoder.

    Raises:
        JobError: one is not.
    """
    known = blocks_of(encoder)
    found: list[str] = []
    for name in names:
        if name == BLOCKS:
            found += [block for block in known if block not in found]
            continue
        match = _LAYER.fullmatch(name)
        if name not in (EMBEDDING, FEATURES) and (match is None or match["block"] not in known):
            raise JobError(
                f"there is no layer {name!r} in this encoder: give {FEATURES}, {EMBEDDING}, "
                f"{BLOCKS} for all of {', '.join(known)}, or one of these, perhaps with @2 for a "
                "grid of 2 x 2"
            )
        found.append(name)
    return tuple(found)


def encode_with(encoder: Encoder, names: Sequence[str]) -> Encode:
    """A function of pixels (B, 3, S, S) in 0..1 that gives (B, F) float32 for each name.

    The encoder must be in evaluation mode; nothing of it changes.
    """
    known, device = blocks_of(encoder), encoder.pixel_mean.device
    wanted = {name: _LAYER.fullmatch(name) for name in names if name not in (EMBEDDING, FEATURES)}
    last = list(known)[-1].partition(".")[0]

    @torch.inference_mode()
    def encode(pixels: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks = []
        for name, match in wanted.items():
            assert match is not None  # `expanded` checked it

            def keep(
                module: nn.Module,
                given: Any,
                maps: Tensor,
                name: str = name,
                match: re.Match[str] = match,
            ) -> None:
                grid = int(match["grid"]) if match["grid"] else _paper_grid(match["block"], maps)
                seen[name] = nn.functional.adaptive_avg_pool2d(maps, grid).flatten(1)

            hooks.append(known[match["block"]].register_forward_hook(keep))
        try:
            with torch.autocast(device.type, enabled=False):
                output = encoder(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        seen |= {FEATURES: output.features, EMBEDDING: output.embedding}
        return {name: seen[name].float() for name in names}

    def _paper_grid(block: str, maps: Tensor) -> int:
        if block.partition(".")[0] == last:  # the authors pool the last stage to 1 x 1
            return 1
        return max(1, min(maps.shape[-1], math.isqrt(POOLED_NUMBERS // maps.shape[1])))

    return encode
