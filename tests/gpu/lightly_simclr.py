"""SimCLR by the lightly library's own parts, on the images that tests/gpu/cifar10.py trains on.

In: images. Out: a trained backbone, epoch by epoch in a file, so that it is trained in slices.
Network, head, loss and views are lightly's; schedule and batch are those of its CIFAR-10 benchmark.
lightly is no dependency of this project: install it from PyPI, or carry its wheels.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 6e-2, 0.9, 5e-4, 128  # of lightly's benchmark
COLOUR_STRENGTH = 0.5
STATE = "state.pt"


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images
        side = images.shape[1]
        self.views = SimCLRTransform(
            input_size=side, cj_strength=COLOUR_STRENGTH, gaussian_blur=0.0
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = self.views(Image.fromarray(self.images[index]))
        return first, second


class State(NamedTuple):
    """What a slice begins with."""

    backbone: nn.Module
    head: nn.Module
    optimiser: torch.optim.Optimizer
    epochs_done: int
    seconds: float


def open_state(folder: Path, device: torch.device, seed: int) -> State:
    torch.manual_seed(seed)
    resnet = ResNetGenerator("resnet-18")
    backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = SimCLRProjectionHead(512, 512, 128)
    backbone, head = backbone.to(device), head.to(device)
    optimiser = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()],
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    path = folder / STATE
    if not path.is_file():
        return State(backbone, head, optimiser, 0, 0.0)
    saved = torch.load(path, map_location=device, weights_only=True)
    backbone.load_state_dict(saved["backbone"])
    head.load_state_dict(saved["head"])
    optimiser.load_state_dict(saved["optimiser"])
    return State(backbone, head, optimiser, saved["epochs"], saved["seconds"])


def train(
    folder: Path,
    images: NDArray[np.uint8],
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    ends: float,
    workers: int,
) -> bool:
    """Train until `epochs` are done or the clock says `ends`; whether they are done."""
    folder.mkdir(exist_ok=True)
    backbone, head, optimiser, done, seconds = open_state(folder, device, seed)
    loss_of = NTXentLoss()
    batch = min(BATCH, len(images))
    for epoch in range(done, epochs):
        if time.monotonic() > ends:
            return False
        began = time.monotonic()
        torch.manual_seed(seed * 100_003 + epoch)
        loader = DataLoader(
            Pairs(images),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        for group in optimiser.param_groups:
            group["lr"] = LR * batch / BATCH * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        backbone.train()
        for first, second in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                both = head(backbone(torch.cat([first, second]).to(device)))
            loss = loss_of(*both.float().chunk(2))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seconds += time.monotonic() - began
        content: dict[str, Any] = {
            "backbone": backbone.state_dict(),
            "head": head.state_dict(),
            "optimiser": optimiser.state_dict(),
            "epochs": epoch + 1,
            "seconds": seconds,
        }
        fresh = folder / f"{STATE}.new"
        torch.save(content, fresh)
        fresh.replace(folder / STATE)
    return True


@torch.inference_mode()
def embedded(
    state: State, images: NDArray[np.uint8], device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (N, 512) and projections (N, 128) of un-augmented images."""
    state.backbone.eval()
    state.head.eval()
    views = SimCLRTransform(input_size=images.shape[1]).transforms[0].transform
    normalise = views.transforms[-1]  # as in training
    outputs = []
    for first in range(0, len(images), 500):
        pixels = torch.from_numpy(images[first : first + 500]).permute(0, 3, 1, 2).float() / 255
        features = state.backbone(normalise(pixels).to(device))
        outputs.append((features.cpu().numpy(), state.head(features).cpu().numpy()))
    features, projections = zip(*outputs, strict=True)
    return np.concatenate(features), np.concatenate(projections)
