"""The network that is pretrained: a convolutional backbone and a projection head.

In: batches of images on the 0..1 scale. Out: backbone features (B, F), which downstream tasks use,
and unit-length embeddings (B, D), which the memory bank and the gallery hold.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import EncoderConfig

# Channel statistics of ImageNet's training set on the 0..1 scale, RGB, as torchvision publishes
# them for its models. Kept for every data set: batch normalisation absorbs the difference.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

# At this side and below a ResNet takes the CIFAR stem: the ImageNet stem's first two layers shrink
# an image fourfold, which leaves 1 x 1 in the last stage of a 32 px image.
CIFAR_STEM_UP_TO_PX = 64

# Width of each block of the small backbone; every block halves the side, 8 px end as 1 x 1.
SMALL_WIDTHS = (32, 64, 128, 256)

# Far below the length of any embedding seen in training, far above float32's smallest number.
UNIT_LENGTH_EPS = 1e-12


class EncoderOutput(NamedTuple):
    """What an encoder says of B images."""

    features: Tensor  # (B, F), the backbone's pooled activations
    embedding: Tensor  # (B, D) float32 of unit length; zeros only where the head gave exact zeros


class Encoder(nn.Module):
    """Pixel normalisation, backbone, projection head and scaling to unit length.

    Attributes:
        feature_dim: F.
        embedding_dim: D.
        image_size_px: S, the side of the images it was built for.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, feature_dim: int, dim: int, size_px: int
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.embedding_dim = dim
        self.image_size_px = size_px
        self.backbone = backbone
        self.head = head
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> EncoderOutput:
        """Encode (B, 3, S, S) floats in 0..1.

        Under autocast the features keep the type autocast gave them; the embedding is float32.
        """
        features = self.backbone((pixels - self.pixel_mean) / self.pixel_std)  # (B, F)
        projected = self.head(features).float()  # (B, D)
        # An exact zero vector stays zero instead of turning into NaN: there is no direction to give
        # it, and the similarity 0 to everything is what the losses can live with.
        return EncoderOutput(features, nn.functional.normalize(projected, eps=UNIT_LENGTH_EPS))


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build an encoder with random weights, drawn from torch's global generator.

    Nothing is downloaded: torchvision gives the ResNets' layers, never their trained weights.
    """
    backbone, feature_dim = _BACKBONES[config.backbone](config.image_size_px)
    head: list[nn.Module] = []
    if config.head == "mlp":  # F -> F -> ReLU -> D as in the authors' code: no normalisation within
        head += [nn.Linear(feature_dim, feature_dim), nn.ReLU()]
    head.append(nn.Linear(feature_dim, config.dim))
    if config.normalise:
        # Not in the paper. On small sets with small networks all embeddings become equal within an
        # epoch; forcing every dimension to vary over the batch prevents it. Without an affine part,
        # which could learn the collapse back.
        head.append(nn.BatchNorm1d(config.dim, affine=False))
    return Encoder(
        backbone,
        nn.Sequential(*head),
        feature_dim=feature_dim,
        dim=config.dim,
        size_px=config.image_size_px,
    )


def embed_images(
    encoder: Encoder, batches: Iterable[NDArray[np.uint8]], device: torch.device | str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Encode un-augmented images in evaluation mode, without gradient, in float32.

    The encoder is moved to `device`; each of its modules is left in the mode it came in.

    Args:
        batches: uint8 (B, S, S, 3) RGB each, S = encoder.image_size_px; B may vary.

    Returns:
        features (N, F) and unit-length embeddings (N, D), both float32, in the order of the images.

    Raises:
        ValueError: a batch of another type or shape.
    """
    features = [np.empty((0, encoder.feature_dim), np.float32)]
    embeddings = [np.empty((0, encoder.embedding_dim), np.float32)]
    side = encoder.image_size_px
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.to(device).eval()
    try:
        with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False):
            for images in batches:
                if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
                    raise ValueError(
                        f"wanted images uint8 (B, {side}, {side}, 3), "
                        f"got {images.dtype} {images.shape}"
                    )
                output = encoder(pixels_from_uint8(torch.tensor(images, device=device)))
                features.append(output.features.cpu().numpy())
                embeddings.append(output.embedding.cpu().numpy())
    finally:
        for module, training in modes:
            module.training = training
    return np.concatenate(features), np.concatenate(embeddings)


def pixels_from_uint8(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in 0..1, as every encoder takes them."""
    # Contiguous, because with the permuted strides global pooling would export as a gather.
    pixels = images.permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255


def _small(size_px: int) -> tuple[nn.Module, int]:
    """Four blocks of stride 2 and a global mean: 0.39 M parameters, for samples of 8..32 px."""
    layers: list[nn.Module] = []
    channels = 3
    for width in SMALL_WIDTHS:
        layers += [
            nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def _resnet18(size_px: int) -> tuple[nn.Module, int]:
    return _without_classifier(torchvision.models.resnet18(weights=None), size_px)


def _resnet50(size_px: int) -> tuple[nn.Module, int]:
    return _without_classifier(torchvision.models.resnet50(weights=None), size_px)


def _without_classifier(resnet: torchvision.models.ResNet, size_px: int) -> tuple[nn.Module, int]:
    feature_dim = cast(int, resnet.fc.in_features)
    resnet.fc = nn.Identity()
    if size_px <= CIFAR_STEM_UP_TO_PX:
        stem = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        # torchvision's own rule for the layer this one stands in for.
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        resnet.conv1 = stem
        resnet.maxpool = nn.Identity()
    return resnet, feature_dim


_BACKBONES: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "small": _small,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
}
