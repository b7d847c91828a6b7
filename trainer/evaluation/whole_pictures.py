"""Pictures as large as they are, for what counts in their own pixels; no torch, for the processes.

In: pictures that could be decoded before. Out: (h, w, 3) uint8 each.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.datasets import Picture, changed_meanwhile
from trainer.datasets.source import TRAIN_FORMATS
from trainer.representation.preprocess import ImageRejected, decode

Named = tuple[str, Picture]


def decode_whole(named: tuple[Named, ...]) -> list[NDArray[np.uint8]]:
    """(h, w, 3) of each picture that could be decoded before.

    Raises:
        DataError: one cannot any more.
    """
    images = []
    for name, picture in named:
        if isinstance(picture, np.ndarray):
            images.append(picture)
            continue
        try:
            encoded = picture if not hasattr(picture, "read") else picture.read()
            images.append(np.asarray(decode(encoded, formats=TRAIN_FORMATS)))
        except (ImageRejected, OSError) as error:
            raise changed_meanwhile(name, error) from error
    return images
