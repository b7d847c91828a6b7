"""Training views: ours, batched, against one image after another with Pillow.

    python tests/benchmarks/augmentation.py                    # 32 px, B = 128: goal >= 4x Pillow
    python tests/benchmarks/augmentation.py --source 256 --size 224 --batch 16 --blur
    PYTHONPATH=FOLDER python tests/benchmarks/augmentation.py  # with kornia installed in FOLDER

Random resized crop, colour jitter, grey, flip, on request blur, with the recipe `folder`'s
strengths, from uint8 to (B, 3, S, S) floats in 0..1. One thread; the variants take turns; medians
of the thread's own CPU time for each image, so that neighbours on the machine count little.
torchvision's v2 transforms get tensors, one by one, as in a data loader; kornia gets the batch.
"""

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.augment import Views, apply_views, collate, draw_views
from trainer.config import load_recipe
from trainer.host_memory import keep_freed_memory

Images = list[np.ndarray]


def photos(count: int, side: int) -> Images:
    """Smooth colours with some noise, as photos have: hues differ, few pixels are grey."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    smooth = [
        Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in coarse
    ]
    noise = draw.integers(-8, 9, (count, side, side, 3))
    made = np.stack([np.asarray(each) for each in smooth]).astype(np.int64) + noise
    return list(made.clip(0, 255).astype(np.uint8))


def with_pillow(images: Images, views: Views, size_px: int) -> Tensor:
    """Each image by itself, the operations that `views` holds."""
    made = np.empty((len(images), 3, size_px, size_px), np.float32)
    columns = [column.tolist() for column in views[:-1]]
    for i, pixels in enumerate(images):
        _, box, flipped, _, _, jittered, factors, grayed, blurred, sigma = (
            column[i] for column in columns
        )
        left, top, width, height = box
        image = Image.fromarray(pixels).resize(
            (size_px, size_px),
            Image.Resampling.BILINEAR,
            box=(left, top, left + width, top + height),
        )
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if jittered:
            for step in views.plan.order:
                if step == 0:
                    image = ImageEnhance.Brightness(image).enhance(factors[0])
                elif step == 1:
                    image = ImageEnhance.Contrast(image).enhance(factors[1])
                elif step == 2:
                    image = ImageEnhance.Color(image).enhance(factors[2])
                else:
                    hue, saturation, value = image.convert("HSV").split()
                    shifted = np.asarray(hue) + np.uint8(round(factors[3] * 255) % 256)
                    turned = Image.fromarray(shifted, "L")
                    image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
        if grayed:
            image = image.convert("L").convert("RGB")
        if blurred:
            image = image.filter(ImageFilter.GaussianBlur(sigma))
        np.multiply(np.asarray(image).transpose(2, 0, 1), 1 / 255, out=made[i], dtype=np.float32)
    return torch.from_numpy(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=int, default=32, help="side of the images")
    parser.add_argument("--size", type=int, default=32, help="side of the views")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blur", action="store_true")
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as trainer.run does
    size_px = options.size
    config = load_recipe("folder").augment
    if not options.blur:
        config = config.model_copy(update={"blur": 0.0})
    images = photos(options.batch, options.source)
    generator = torch.Generator().manual_seed(0)
    planar = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]

    def ours(fixed_shapes: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            block = collate(images)
            views = draw_views(config, block.sizes, generator)
            return apply_views(block.pixels, views, size_px=size_px, fixed_shapes=fixed_shapes)

        return run

    def pillow() -> Tensor:
        sizes = torch.full((options.batch, 2), options.source)
        return with_pillow(images, draw_views(config, sizes, generator), size_px)

    ratio = (1 / config.crop_ratio_max, config.crop_ratio_max)
    scale = (config.crop_scale_min, config.crop_scale_max)
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    taps = 2 * round(3 * config.blur_sigma_max_px) + 1
    sigmas = (config.blur_sigma_min_px, config.blur_sigma_max_px)
    each = [
        v2.RandomResizedCrop(size_px, scale=scale, ratio=ratio, antialias=True),
        v2.RandomHorizontalFlip(config.flip),
        v2.RandomApply([v2.ColorJitter(*strengths)], config.jitter),
        v2.RandomGrayscale(config.gray),
    ]
    if options.blur:
        each.append(v2.RandomApply([v2.GaussianBlur(taps, sigmas)], config.blur))
    transform = v2.Compose([*each, v2.ToDtype(torch.float32, scale=True)])

    def torchvision_v2() -> Tensor:
        return torch.stack([transform(image) for image in planar])

    variants = {
        "Pillow, one by one": pillow,
        "ours, batched": ours(fixed_shapes=False),
        "ours, fixed shapes": ours(fixed_shapes=True),
        "torchvision v2, one by one": torchvision_v2,
    }
    if importlib.util.find_spec("kornia") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import kornia
            from kornia import augmentation

        changes = [
            augmentation.RandomResizedCrop((size_px, size_px), scale=scale, ratio=ratio),
            augmentation.RandomHorizontalFlip(p=config.flip),
            augmentation.ColorJitter(*strengths, p=config.jitter),
            augmentation.RandomGrayscale(p=config.gray),
        ]
        if options.blur:
            changes.append(augmentation.RandomGaussianBlur((taps, taps), sigmas, p=config.blur))
        batched = augmentation.AugmentationSequential(*changes)

        def with_kornia() -> Tensor:
            made = batched(torch.stack(planar).float() / 255)
            assert isinstance(made, Tensor)
            return made

        variants[f"kornia {kornia.__version__}, batched"] = with_kornia

    check(config_images=images, size_px=size_px, blur=options.blur)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in variants.values():
            run()
        names = list(variants)
        for repeat in range(options.repeats):
            # Each follows each other in turn: what ran before leaves caches and heap its own way.
            draw = np.random.default_rng(repeat)
            for name in draw.permutation(names):
                began = time.thread_time()
                variants[name]()
                seconds[name].append(time.thread_time() - began)
    print(
        f"{options.source} px -> {size_px} px, B = {options.batch}"
        f"{', blur' if options.blur else ''}, one thread, torch {torch.__version__}"
    )
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        fold = medians["Pillow, one by one"] / median
        spread = min(seconds[name]), max(seconds[name])
        low, high = (f"{1e6 * value / options.batch:.1f}" for value in spread)
        print(
            f"{name:30s} {1e6 * median / options.batch:8.1f} us an image ({low} to {high})"
            f"  {fold:5.2f}x Pillow's speed"
        )


def check(config_images: Images, size_px: int, *, blur: bool) -> None:
    """Print how far our views are from Pillow's of the same draws."""
    config = load_recipe("folder").augment
    # Its blur is three passes of a box, an approximation.
    config = config.model_copy(update={"blur": 0.0}) if not blur else config
    block = collate(config_images)
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(1))
    apart = with_pillow(config_images, views, size_px) - apply_views(
        block.pixels, views, size_px=size_px
    )
    print(f"mean difference from Pillow    {float(255 * apart.abs().mean()):.2f} grey levels")


if __name__ == "__main__":
    main()
