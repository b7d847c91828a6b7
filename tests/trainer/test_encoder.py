import numpy as np
import pytest
import torch
from torch import nn

from trainer.config import EncoderConfig
from trainer.encoder import (
    PIXEL_MEAN,
    PIXEL_STD,
    Encoder,
    build_encoder,
    embed_images,
    pixels_from_uint8,
)


def config(**changes: object) -> EncoderConfig:
    values = {"backbone": "small", "image_size_px": 32, "head": "linear", "dim": 128}
    return EncoderConfig(**{**values, "normalise": False, **changes})


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def images(count: int, size_px: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, size_px, size_px, 3), np.uint8)


@pytest.mark.parametrize(
    ("backbone", "size_px", "feature_dim"),
    [("small", 8, 256), ("small", 32, 256), ("resnet18", 32, 512), ("resnet50", 32, 2048)],
)
def test_encoder__has_the_dims_it_states(backbone: str, size_px: int, feature_dim: int) -> None:
    encoder = build_encoder(config(backbone=backbone, image_size_px=size_px, dim=16))
    output = encoder.eval()(torch.rand(2, 3, size_px, size_px))
    assert encoder.feature_dim == feature_dim
    assert (encoder.embedding_dim, encoder.image_size_px) == (16, size_px)
    assert output.features.shape == (2, feature_dim)
    assert output.embedding.shape == (2, 16)
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(2))


def test_small__is_compact() -> None:
    encoder = build_encoder(config())
    weights = sum(p.numel() for p in encoder.backbone.parameters())
    # 9 (3 32 + 32 64 + 64 128 + 128 256) for the convolutions, 2 (32 + 64 + 128 + 256) for the BNs
    assert weights == 9 * (96 + 2048 + 8192 + 32768) + 2 * 480 == 388_896


@pytest.mark.parametrize(("size_px", "last_side"), [(32, 4), (64, 8), (65, 3), (96, 3)])
def test_resnet__has_the_cifar_stem_up_to_64_px(size_px: int, last_side: int) -> None:
    backbone = build_encoder(config(backbone="resnet18", image_size_px=size_px)).backbone.eval()
    sides = []
    backbone.layer4.register_forward_hook(lambda module, given, got: sides.append(got.shape[-1]))
    with torch.no_grad():
        backbone(torch.rand(1, 3, size_px, size_px))
    assert sides == [last_side]  # an eighth of the side, or a thirty-second rounded up


@pytest.mark.parametrize(("backbone", "feature_dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnet__has_no_classifier(backbone: str, feature_dim: int) -> None:
    names = build_encoder(config(backbone=backbone)).state_dict()
    assert not [name for name in names if ".fc." in name]
    assert names["head.0.weight"].shape == (128, feature_dim)


@pytest.mark.parametrize(
    ("head", "normalise", "layers"),
    [
        ("linear", False, [nn.Linear]),
        ("linear", True, [nn.Linear, nn.BatchNorm1d]),
        ("mlp", False, [nn.Linear, nn.ReLU, nn.Linear]),
        ("mlp", True, [nn.Linear, nn.ReLU, nn.Linear, nn.BatchNorm1d]),
    ],
)
def test_head__is_the_one_asked_for(head: str, normalise: bool, layers: list[type]) -> None:
    built = build_encoder(config(head=head, normalise=normalise)).head
    assert [type(layer) for layer in built] == layers
    if head == "mlp":
        assert built[0].weight.shape == (256, 256)
    if normalise:
        assert built[-1].weight is None
        assert built[-1].bias is None


def test_normalise__keeps_equal_directions_apart() -> None:
    # Outputs that share one large offset are nearly parallel; the head's normalisation undoes it.
    spread = {}
    for normalise in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder(config(normalise=normalise, dim=8)).train()
        with torch.no_grad():
            encoder.head[0].bias.fill_(100.0)
        embedding = encoder(torch.rand(16, 3, 32, 32)).embedding.detach()
        spread[normalise] = float((embedding @ embedding.T).min())
    assert spread[False] > 0.99
    assert spread[True] < 0.5


def test_encoder__applies_mean_and_std_itself() -> None:
    encoder = Encoder(nn.Flatten(), nn.Identity(), feature_dim=3, dim=3, size_px=1)
    pixels = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    wanted = [(1 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(encoder(pixels).features, torch.tensor([wanted]))
    assert PIXEL_MEAN == (0.485, 0.456, 0.406)
    assert PIXEL_STD == (0.229, 0.224, 0.225)
    assert {"pixel_mean", "pixel_std"} <= set(encoder.state_dict())


def test_encoder__zero_vector_is_no_nan() -> None:
    encoder = Encoder(nn.Flatten(), nn.Linear(3, 4), feature_dim=3, dim=4, size_px=1)
    nn.init.zeros_(encoder.head.weight)
    nn.init.zeros_(encoder.head.bias)
    embedding = encoder(torch.rand(2, 3, 1, 1)).embedding
    embedding.sum().backward()
    assert torch.equal(embedding, torch.zeros(2, 4))
    assert torch.isfinite(encoder.head.weight.grad).all()


@pytest.mark.parametrize("normalise", [False, True])
def test_encoder__embedding_is_float32_under_bf16_autocast(normalise: bool) -> None:
    encoder = build_encoder(config(normalise=normalise)).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(torch.rand(4, 3, 32, 32))
    assert output.features.dtype == torch.bfloat16  # autocast was really on
    assert output.embedding.dtype == torch.float32
    # Scaled in float32: bf16 would leave lengths off by up to 4e-3.
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)


def test_build_encoder__same_seed_same_weights() -> None:
    first = build_encoder(config()).state_dict()
    torch.manual_seed(0)
    second = build_encoder(config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pixels_from_uint8__scales_and_puts_channels_first() -> None:
    given = np.array([[[[0, 51, 255], [255, 0, 102]]]], np.uint8)  # (1, 1, 2, 3)
    wanted = torch.tensor([[[[0.0, 1.0]], [[0.2, 0.0]], [[1.0, 0.4]]]])
    torch.testing.assert_close(pixels_from_uint8(torch.tensor(given)), wanted)


def test_embed_images__equals_a_plain_forward_whatever_the_batches() -> None:
    encoder = build_encoder(config())
    given = images(5, 32)
    features, embeddings = embed_images(encoder, [given[:2], given[2:]], "cpu")
    with torch.no_grad():
        plain = encoder.eval()(torch.tensor(given).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(features, plain.features.numpy(), atol=1e-6)
    np.testing.assert_allclose(embeddings, plain.embedding.numpy(), atol=1e-6)
    assert features.dtype == embeddings.dtype == np.float32


def test_embed_images__of_nothing_is_empty() -> None:
    features, embeddings = embed_images(build_encoder(config()), [], "cpu")
    assert features.shape == (0, 256)
    assert embeddings.shape == (0, 128)


def test_embed_images__leaves_modes_and_statistics_alone() -> None:
    encoder = build_encoder(config()).train()
    encoder.head.eval()  # say, frozen
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed_images(encoder, [images(2, 32)], "cpu")
    assert encoder.training
    assert encoder.backbone[1].training
    assert not encoder.head.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_embed_images__is_float32_inside_an_autocast() -> None:
    encoder = build_encoder(config())
    given = [images(3, 32)]
    outside = embed_images(encoder, given, "cpu")[1]
    with torch.autocast("cpu", torch.bfloat16):
        inside = embed_images(encoder, given, "cpu")[1]
    np.testing.assert_array_equal(inside, outside)


def test_embed_images__wrong_input_restores_the_mode() -> None:
    encoder = build_encoder(config()).train()
    with pytest.raises(ValueError, match=r"uint8 \(B, 32, 32, 3\).*float32 \(2, 32, 32, 3\)"):
        embed_images(encoder, [images(2, 32).astype(np.float32)], "cpu")
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\)"):
        embed_images(encoder, [images(2, 16)], "cpu")
    assert encoder.training
