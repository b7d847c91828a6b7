"""A small tree as PASCAL VOC's, composed of real photos with known places.

In: ../shared/data. Out: grey scenes on which one or two photos lie, each an object of its class.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ARCHIVE = Path(__file__).parents[4] / "shared" / "data" / "imagenette224_subset5100.tar"
CLASSES = ("tench", "church")
FOLDERS = ("n01440764", "n03028079")
SCENE_PX, LEAST_PX, MOST_PX = 128, 44, 68


def write_photo_tree(root: Path, scenes: int) -> Path:
    """A tree whose lists `trainval` and `test` name the same scenes: to be learned by heart."""
    if not ARCHIVE.is_file():
        pytest.skip(f"{ARCHIVE} is not there")
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    photos = _photos(4)
    draw = np.random.default_rng(0)
    keys = [f"scene{number:02d}" for number in range(scenes)]
    for listed in ("trainval", "test"):
        (root / "ImageSets" / "Main" / f"{listed}.txt").write_text("\n".join(keys) + "\n")
    for number, key in enumerate(keys):
        scene = Image.new("RGB", (SCENE_PX, SCENE_PX), (110, 110, 110))
        objects = []
        for half in range(1 + number % 2):
            label = (number + half) % len(CLASSES)
            side = int(draw.integers(LEAST_PX, MOST_PX if number % 2 == 0 else 60))
            low = half * SCENE_PX // 2
            room = SCENE_PX // 2 if number % 2 else SCENE_PX
            left = low + int(draw.integers(0, max(1, room - side + 1)))
            top = int(draw.integers(0, SCENE_PX - side + 1))
            photo = photos[label][int(draw.integers(len(photos[label])))]
            scene.paste(photo.resize((side, side)), (left, top))
            objects.append((CLASSES[label], left, top, left + side, top + side))
        scene.save(root / "JPEGImages" / f"{key}.jpg", quality=95)
        # VOC counts from 1, its right and lower edges are inside.
        listed = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin>"
            f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{low}</ymax></bndbox></object>"
            for name, left, top, right, low in objects
        )
        (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{listed}</annotation>")
    return root


def _photos(each: int) -> list[list[Image.Image]]:
    """A few photos of each class."""
    found: list[list[Image.Image]] = [[] for _ in FOLDERS]
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            for seat, folder in enumerate(FOLDERS):
                if f"train/{folder}/" in member.name and len(found[seat]) < each:
                    content = archive.extractfile(member)
                    if content is not None:
                        found[seat].append(Image.open(io.BytesIO(content.read())).convert("RGB"))
            if all(len(photos) == each for photos in found):
                break
    return found
