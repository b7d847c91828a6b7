"""A JPEG to 224 px: our `prepare` against simplejpeg's scaled decode and plain Pillow.

    python tests/benchmarks/decode.py [--rounds 15]

simplejpeg may scale by any eighth, Pillow by halves: at 500 x 375 it decodes 5/8 of what we must; a
second reference decodes the size that we do. Goals: at most 1.15 x the time of simplejpeg's scaled
decode with the same resize, and at 12 Mpx at least 3.5 x as fast as Pillow that decodes whole.
Processor time, in turns, medians.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.served_models import jpeg, photo
from trainer.representation.preprocess import InputContract, decode, fit, prepare

SIDE = 224
CONTRACT = InputContract(size_px=SIDE)
SIZES = ((500, 375), (1600, 1200), (4000, 3000))
_SCALED: dict[bytes, tuple[int, int]] = {}
say = sys.stdout.write


def of_pillow(content: bytes) -> NDArray[np.uint8]:
    """What one writes first: decode whole, crop, resize."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def of_simplejpeg(content: bytes) -> NDArray[np.uint8]:
    """libjpeg-turbo's scaled decode by another binding, then our resize."""
    pixels = simplejpeg.decode_jpeg(content, min_height=SIDE, min_width=SIDE)
    return fit(Image.fromarray(pixels), CONTRACT)


def of_simplejpeg_at_our_scale(content: bytes) -> NDArray[np.uint8]:
    """The same decoder settings as Pillow's, and its size."""
    size = decode(content, least_side_px=SIDE).size if content not in _SCALED else _SCALED[content]
    _SCALED[content] = size
    pixels = simplejpeg.decode_jpeg(
        content, min_height=size[1], min_width=size[0], fastdct=False, fastupsample=False
    )
    return fit(Image.fromarray(pixels), CONTRACT)


def ours(content: bytes) -> NDArray[np.uint8]:
    """The service's way."""
    return prepare(content, CONTRACT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for width, height in SIZES:
        content = jpeg(photo(1, width, height))
        took: dict[str, list[float]] = {}
        repeats = max(1, 3_000_000 // (width * height))
        for _ in range(rounds):
            for way in (ours, of_simplejpeg, of_simplejpeg_at_our_scale, of_pillow):
                begun = time.process_time()
                for _ in range(repeats):
                    way(content)
                took.setdefault(way.__name__, []).append((time.process_time() - begun) / repeats)
        median = {name: 1000 * statistics.median(values) for name, values in took.items()}
        scaled = median["ours"] / median["of_simplejpeg"]
        same = median["ours"] / median["of_simplejpeg_at_our_scale"]
        say(
            f"{width} x {height}, {len(content):,} bytes: ours {median['ours']:.2f} ms, simplejpeg "
            f"{median['of_simplejpeg']:.2f} ms (ours takes {scaled:.2f} x), "
            f"at our scale {median['of_simplejpeg_at_our_scale']:.2f} ms ({same:.2f} x), plain "
            f"Pillow {median['of_pillow']:.2f} ms "
            f"(ours is {median['of_pillow'] / median['ours']:.2f} x as fast)\n"
        )


if __name__ == "__main__":
    main()
