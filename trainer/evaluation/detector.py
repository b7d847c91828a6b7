"""A Faster R-CNN on a single map of a ResNet ("C4"), out of torchvision's parts.

In: an encoder. Out: a detector whose map is the body through layer3 and whose box head is layer4
and one more normalisation, as detectron2's R50-C4 with the extra norm that MoCo added. Nothing is
frozen, normalisations learn.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from trainer.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from trainer.evaluation.job import JobError
from trainer.evaluation.protocol_settings import DetectionSettings

# detectron2's for C4: proposals before and after suppression, in training and at the test.
BEFORE_TRAIN, AFTER_TRAIN, BEFORE_TEST, AFTER_TEST = 12_000, 2_000, 6_000, 1_000
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
BODY = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
BOX_HEAD = "layer4"


def build_detector(
    encoder: Encoder, num_classes: int, settings: DetectionSettings, *, seed: int
) -> FasterRCNN:
    """A detector of `num_classes` classes, numbered from 1, around the encoder's own layers.

    Args:
        encoder: is taken, not copied.
        seed: of the weights of the new layers.

    Raises:
        JobError: the encoder is no ResNet.
    """
    backbone = encoder.backbone
    if not hasattr(backbone, BOX_HEAD):
        raise JobError(
            "detection wants a bundle whose encoder is a ResNet (resnet18 or resnet50): this "
            "backbone has no layer4 to be the box head"
        )
    device = encoder.pixel_mean.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = _Body(backbone)
        detector = FasterRCNN(
            body,
            num_classes=None,
            min_size=settings.test_short_side_px,
            max_size=settings.long_side_px,
            image_mean=list(PIXEL_MEAN),
            image_std=list(PIXEL_STD),
            rpn_anchor_generator=AnchorGenerator((settings.anchors_px,), (RATIOS,)),
            rpn_pre_nms_top_n_train=BEFORE_TRAIN,
            rpn_post_nms_top_n_train=AFTER_TRAIN,
            rpn_pre_nms_top_n_test=BEFORE_TEST,
            rpn_post_nms_top_n_test=AFTER_TEST,
            box_batch_size_per_image=settings.rois,
            box_roi_pool=MultiScaleRoIAlign(["0"], settings.roi_size, sampling_ratio=0),
            box_head=nn.Sequential(
                backbone.get_submodule(BOX_HEAD),
                nn.BatchNorm2d(encoder.feature_dim),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            box_predictor=FastRCNNPredictor(encoder.feature_dim, num_classes + 1),
        )
    detector.requires_grad_(True)
    return detector.to(device)


def sized(detector: FasterRCNN, short_sides_px: tuple[int, ...]) -> FasterRCNN:
    """The detector, which from now on resizes images to one of these short sides."""
    detector.transform.min_size = short_sides_px
    return detector


class _Body(nn.Module):
    """A ResNet through layer3; `out_channels` is what torchvision asks a backbone for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(backbone.get_submodule(name) for name in BODY))
        with torch.no_grad():
            was = self.layers.training
            side = 64
            device = next(self.layers.parameters()).device
            seen = self.layers.eval()(torch.zeros(1, 3, side, side, device=device))
            self.layers.train(was)
        self.out_channels = int(seen.shape[1])
        self.stride_px = side // seen.shape[2]  # pixels from one place of the map to the next

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, h, w)."""
        maps: Tensor = self.layers(images)
        return maps
