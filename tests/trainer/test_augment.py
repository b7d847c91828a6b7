"""What happens to each image, and the two ways to apply it.

Run: pytest tests/trainer/test_augment.py
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from trainer import augment
from trainer.augment import CROP_ATTEMPTS, apply_views, collate, draw_views, place_crops
from trainer.config import AugmentConfig, load_recipe

NOTHING = dict.fromkeys(("flip", "vertical_flip", "quarter_turns", "jitter", "gray", "blur"), 0.0)


def _images(count: int = 4) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (20 + i, 30 - 3 * i, 3), dtype=np.uint8) for i in range(count)]


def _config(**changes: float) -> AugmentConfig:
    return load_recipe("folder").augment.model_copy(update=changes)


def test_collate__puts_images_of_any_size_in_the_upper_left_corner() -> None:
    images = _images()
    block = collate(images)
    assert block.pixels.shape == (4, 23, 30, 3)
    assert block.sizes.tolist() == [[20, 30], [21, 27], [22, 24], [23, 21]]
    for image, row in zip(images, block.pixels, strict=True):
        height, width = image.shape[:2]
        assert (row[:height, :width].numpy() == image).all()
        assert row[height:].sum() == row[:, width:].sum() == 0


def test_crops__lie_inside_and_have_the_area_and_shape_asked_for() -> None:
    sizes = torch.tensor([[20, 30], [100, 10], [8, 8]]).repeat(200, 1)
    boxes = draw_views(_config(), sizes, torch.Generator().manual_seed(0)).boxes
    left, top, width, height = boxes.unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= sizes[:, 1] + 1e-9).all()
    assert (top + height <= sizes[:, 0] + 1e-9).all()
    share = width * height / (sizes[:, 0] * sizes[:, 1])
    ordinary = sizes[:, 0] != 100  # on a 10:1 image the central crop of the last resort is smaller
    assert share[ordinary].min() >= 0.2
    assert share[ordinary].min() < 0.25
    assert share[ordinary].max() > 0.9
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-9
    assert ratio.max() <= 4 / 3 + 1e-9


def test_crop__that_never_fits_becomes_the_largest_central_one() -> None:
    boxes = place_crops(
        torch.tensor([[100, 12]]),
        areas=torch.ones(1, CROP_ATTEMPTS, dtype=torch.float64),
        ratios=torch.ones(1, CROP_ATTEMPTS, dtype=torch.float64),
        places=torch.zeros(1, 2, dtype=torch.float64),
        ratio_max=4 / 3,
    )
    assert boxes[0].tolist() == pytest.approx([0, 42, 12, 16])


def test_views__leave_alone_what_has_probability_zero() -> None:
    config = _config(**NOTHING, crop_scale_min=1.0, crop_ratio_max=1.0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image, image])
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    made = apply_views(block.pixels, views, size_px=8)
    wanted = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    assert (made - wanted).abs().max() < 1e-6


def test_views__do_everything_that_is_drawn() -> None:
    block = collate(_images())
    for name in NOTHING:
        kept = _views(block, _config(**NOTHING))
        done = _views(block, _config(**(NOTHING | {name: 1.0})))
        changed = (kept - done).abs().amax(dim=(1, 2, 3)) > 0.01
        # One turn in four is by no quarter.
        assert changed.any() if name == "quarter_turns" else changed.all(), name
    grey = _views(block, _config(**(NOTHING | {"gray": 1.0})))
    assert (grey[:, 0] == grey[:, 1]).all()


def test_views__happen_to_their_share_of_images() -> None:
    sizes = torch.full((4000, 2), 20)
    views = draw_views(_config(), sizes, torch.Generator().manual_seed(0))
    shares = [views.flipped, views.jittered, views.grayed, views.blurred]
    assert [float(each.float().mean()) for each in shares] == pytest.approx(
        [0.5, 0.8, 0.2, 0.5], abs=0.03
    )
    assert views.sigmas_px.min() >= 0.1
    assert views.sigmas_px.max() <= 2
    assert (views.factors[~views.jittered] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    lows, highs = views.factors.amin(dim=0), views.factors.amax(dim=0)
    assert lows.tolist() == pytest.approx([0.6, 0.6, 0.6, -0.1], abs=0.01)
    assert highs.tolist() == pytest.approx([1.4, 1.4, 1.4, 0.1], abs=0.01)


def test_views__same_generator_same_views_and_independent_images() -> None:
    image = _images(1)[0]
    block = collate([image] * 8)
    first, again = (_views(block, _config()) for _ in range(2))
    assert (first == again).all()
    assert (first - _views(block, _config(), seed=1)).abs().max() > 0.1
    distances = (first[:, None] - first[None]).abs().amax(dim=(2, 3, 4))
    assert (distances + torch.eye(8) > 0.01).all()


def test_views__turn_and_mirror_a_square_in_all_eight_ways_alike_often() -> None:
    config = _config(**(NOTHING | {"flip": 0.5, "quarter_turns": 1.0}), crop_scale_min=1.0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image] * 800)
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double().repeat(800, 1)
    made = apply_views(block.pixels, views._replace(boxes=whole), size_px=8)
    upright = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    turned = [torch.rot90(upright, k, (1, 2)) for k in range(4)]
    eight = torch.stack([*turned, *(each.transpose(1, 2) for each in turned)])
    found = ((made[:, None] - eight).abs().amax(dim=(2, 3, 4)) < 1e-6).long()  # (800, 8)
    assert (found.sum(dim=1) == 1).all()
    assert found.sum(dim=0).tolist() == pytest.approx([100] * 8, abs=30)


@pytest.mark.parametrize(("quarters", "flags"), [(1, "yny"), (2, "yyn"), (3, "nyy")])
def test_views__of_a_quarter_turn_are_a_mirror_and_a_transposition(
    quarters: int, flags: str
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image])
    views = draw_views(_config(**NOTHING), block.sizes, torch.Generator().manual_seed(0))
    flipped, upended, transposed = (torch.tensor([flag == "y"]) for flag in flags)
    views = views._replace(flipped=flipped, upended=upended, transposed=transposed)
    views = views._replace(boxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double())
    made = apply_views(block.pixels, views, size_px=8)[0].permute(1, 2, 0).numpy()
    assert np.abs(made - np.rot90(image, quarters) / 255).max() < 1e-6


def test_views__of_a_seed_are_those_of_earlier_versions() -> None:
    views = draw_views(_config(), torch.full((2, 2), 20), torch.Generator().manual_seed(0))
    assert views.plan.order == (3, 2, 1, 0)
    assert views.boxes[0].tolist() == pytest.approx([0.4299, 0.1393, 18.4204, 16.6393], abs=1e-4)
    assert views.factors[1].tolist() == pytest.approx([1.3946, 1.3425, 1.3317, 0.0201], abs=1e-4)
    assert views.sigmas_px.tolist() == pytest.approx([1.2911, 0.4429], abs=1e-4)
    assert views.flipped.tolist() == views.grayed.tolist() == [False, True]


EVERYTHING = dict.fromkeys(NOTHING, 0.5)


@pytest.mark.parametrize("size_px", [9, 16, 40])
@pytest.mark.parametrize("seed", range(4))
def test_views__of_fixed_shapes_are_those_of_chosen_images(size_px: int, seed: int) -> None:
    block = collate(_images(8))  # of eight sizes
    views = draw_views(_config(**EVERYTHING), block.sizes, torch.Generator().manual_seed(seed))
    drawn = apply_views(block.pixels, views, size_px=size_px, fixed_shapes=False)
    fixed = apply_views(block.pixels, views, size_px=size_px, fixed_shapes=True)
    assert (drawn - fixed).abs().max() < 1e-5
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert fixed.min() >= 0
    assert fixed.max() <= 1 + 1e-6


@pytest.mark.parametrize("change", ["flip", "vertical_flip", "quarter_turns", "jitter", "blur"])
def test_views__of_fixed_shapes_with_one_change(change: str) -> None:
    block = collate(_images(8))
    config = _config(**(NOTHING | {change: 0.5}))
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    drawn = apply_views(block.pixels, views, size_px=16, fixed_shapes=False)
    fixed = apply_views(block.pixels, views, size_px=16, fixed_shapes=True)
    assert (drawn - fixed).abs().max() < 1e-5


def test_views__of_fixed_shapes_are_traced_in_one_piece_for_all_draws_of_a_plan() -> None:
    """No branch on a drawn value and no reading of one: fullgraph refuses both."""
    block = collate(_images(8))
    config, traced = _config(**EVERYTHING, contrast=0.0, hue=0.0), []

    def count(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        traced.append(graph)
        return graph.forward

    def make(pixels: Tensor, packed: Tensor) -> Tensor:
        views = first.unpack(packed)
        return apply_views(pixels, views, size_px=16, fixed_shapes=True)

    first = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    compiled = torch.compile(make, fullgraph=True, dynamic=False, backend=count)
    for seed in range(6):
        views = draw_views(config, block.sizes, torch.Generator().manual_seed(seed))
        views = views._replace(plan=first.plan)
        wanted = apply_views(block.pixels, views, size_px=16, fixed_shapes=False)
        made = compiled(block.pixels, views.pack())
        assert (made - wanted).abs().max() < 1e-5
    assert len(traced) == 1  # never again for another draw


def test_views__in_groups_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block = collate(_images(8))
    views = draw_views(_config(**EVERYTHING), block.sizes, torch.Generator().manual_seed(0))
    whole = apply_views(block.pixels, views, size_px=16)
    monkeypatch.setattr(augment, "CPU_GROUP_BYTES", 3 * 12 * 27 * 30)
    assert (apply_views(block.pixels, views, size_px=16) - whole).abs().max() < 1e-6


def test_views__packed_and_unpacked_are_the_same() -> None:
    views = draw_views(_config(), torch.tensor([[20, 30], [7, 9]]), torch.Generator())
    packed = views.pack()
    assert packed.shape == (2, 17)
    again = views._replace(sizes=torch.zeros(2, 2, dtype=torch.int64)).unpack(packed)
    for one, other in zip(views[:-1], again[:-1], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert views.to(torch.device("cpu")) is views
    assert views.to(torch.device("meta")).boxes.device.type == "meta"


def test_plan__names_only_what_the_recipe_does() -> None:
    sizes = torch.full((2, 2), 20)
    plan = draw_views(_config(**NOTHING), sizes, torch.Generator().manual_seed(0)).plan
    assert plan == ((), False, False, False)
    config = _config(hue=0.0, quarter_turns=0.1, blur=0.0)
    plan = draw_views(config, sizes, torch.Generator().manual_seed(0)).plan
    assert plan == ((2, 1, 0), True, True, False)


def _views(block: augment.Collated, config: AugmentConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    views = draw_views(config, block.sizes, generator)
    return apply_views(block.pixels, views, size_px=16)
