"""How images get from a source into memory: every file is decoded once before training.

In: an `ImageSource`. Out: the usable images, those that are skipped with their reason, and the
pixels from which training crops are taken, while they fit in memory (`trainer.stock` decodes the
others anew). A picture that kills or hangs its decoder costs itself alone. No torch at import: the
decoding processes import this.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.datasets import (
    DataError,
    ImageSource,
    Picture,
    Skipped,
    changed_meanwhile,
    prepared_picture,
    reduced_picture,
)
from trainer.decode_pool import PICTURE_LIMIT_S, DecodePool, limited
from trainer.examination import Chunk, Examiner, examine
from trainer.representation.preprocess import ImageRejected, InputContract
from trainer.shared_block import BlockName, attach

EXAMINED_TOGETHER = 16  # files in one message to a process: some MB of pixels come back
NAMED_IN_ERRORS = 5  # skipped files that an error message names


@dataclass(frozen=True)
class Survey:
    """What the first pass over all images found."""

    source: ImageSource  # the N usable images; the fingerprint covers which were skipped
    skipped: tuple[Skipped, ...]
    sizes: NDArray[np.int32]  # (N, 2) heights and widths as `reduced_picture`
    stored: list[NDArray[np.uint8]] | None  # N x (h, w, 3) as `reduced_picture`; None: too large


class Part(NamedTuple):
    """Some rows of a batch, which a decoding process fills in."""

    block: BlockName
    shape: tuple[int, int, int]  # of the whole batch: B, H, W
    first: int  # row
    names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    sizes: tuple[tuple[int, int], ...]  # as the survey found them
    size_px: int  # side of the crops that are taken


def survey(
    source: ImageSource,
    pool: DecodePool,
    config: DataConfig,
    *,
    size_px: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Survey:
    """Decode every image once; find the unusable ones and store the others while they fit.

    A picture on which a decoding process dies, or that takes longer than PICTURE_LIMIT_S, is found
    by trying those that were lost one by one, and skipped. Without processes (data.workers=0)
    such a picture ends the run.

    Args:
        size_px: side of the crops that will be taken.
        advance: told how many images were done, for a progress bar.

    Raises:
        DataError: more than `config.max_skipped` of the images cannot be used.
    """
    usable: list[int] = []
    sizes: list[tuple[int, int]] = []
    skipped = list(source.skipped)
    # What nvJPEG decodes is not what is decoded here, so it decodes every batch.
    holds = config.resident_limit_bytes > 0 and config.decoder == "pillow"
    stored: list[NDArray[np.uint8]] | None = [] if holds else None
    stored_bytes = index = 0

    def chunks() -> Iterator[Chunk]:
        for first in range(0, len(source), EXAMINED_TOGETHER):
            pictures = source.pictures[first : first + EXAMINED_TOGETHER]
            # Once they do not fit, pixels need not come back from the processes.
            yield Chunk(tuple(pictures), size_px, stored is not None, PICTURE_LIMIT_S)

    with Examiner() as alone:
        for results in pool.stream(examine, chunks(), rescue=alone.examine):
            for result in results:
                if isinstance(result, str):
                    skipped.append(Skipped(source.ids[index], result))
                else:
                    usable.append(index)
                    size, pixels = result
                    sizes.append(size)
                    stored_bytes += 3 * size[0] * size[1]
                    if stored_bytes > config.resident_limit_bytes:
                        stored = None
                    if stored is not None:
                        assert pixels is not None  # they fitted when it was asked for
                        stored.append(pixels)
                index += 1
            advance(len(results))
    _check_skipped(skipped, len(source) + len(source.skipped), config.max_skipped)
    left_out = "\n".join(file.id for file in skipped)
    fingerprint = sha256(f"{source.fingerprint}\n{left_out}".encode()).hexdigest()
    kept = source if len(usable) == len(source) else source.subset(usable)
    return Survey(
        source=replace(kept, fingerprint=fingerprint),
        skipped=tuple(skipped),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        stored=stored,
    )


def fill(part: Part) -> None:
    """Decode the pictures of a part of a batch into their rows of the shared block.

    Each lies in the upper left corner of its row (H, W, 3); what is beside it stays as it was.

    Raises:
        DataError: a picture is no longer what the survey found.
    """
    count, height, width = part.shape
    memory = np.frombuffer(attach(part.block), np.uint8, count=count * height * width * 3)
    rows = memory.reshape(count, height, width, 3)[part.first :]
    for row, name, picture, size in zip(rows, part.names, part.pictures, part.sizes, strict=False):
        image = reduced_or_changed(name, picture, size, part.size_px)
        row[: size[0], : size[1]] = image


def reduced_or_changed(
    name: str, picture: Picture, size: tuple[int, int], size_px: int
) -> NDArray[np.uint8]:
    """(h, w, 3): `reduced_picture` of a picture that the survey found to have that size.

    Raises:
        DataError: it is damaged or of another size since.
    """
    try:
        with limited(PICTURE_LIMIT_S):
            image = reduced_picture(picture, size_px)
    except (ImageRejected, OSError) as error:
        raise changed_meanwhile(name, error) from error
    if image.shape[:2] != tuple(size):
        found = f"{image.shape[0]} x {image.shape[1]} pixels instead of {size[0]} x {size[1]}"
        raise changed_meanwhile(name, ImageRejected(found))
    return image


def prepare_all(
    source: ImageSource, contract: InputContract, pool: DecodePool
) -> NDArray[np.uint8]:
    """(N, S, S, 3): what `ImageSource.prepared` gives for all images, decoded by the pool."""
    side = contract.size_px
    images = np.empty((len(source), side, side, 3), np.uint8)
    firsts = range(0, len(source), EXAMINED_TOGETHER)
    parts = (
        source.subset(range(first, min(first + EXAMINED_TOGETHER, len(source)))) for first in firsts
    )
    chunks = pool.stream(functools.partial(_prepare, contract=contract), parts)
    for first, prepared in zip(firsts, chunks, strict=True):
        images[first : first + len(prepared)] = prepared
    return images


def prepared_or_reasons(
    source: ImageSource, contract: InputContract, pool: DecodePool
) -> Iterator[NDArray[np.uint8] | str]:
    """For each image in order: (S, S, 3) as `ImageSource.prepared`, or why it cannot be used.

    A picture on which a decoding process dies or that takes too long is found as by `survey`.
    """
    function = functools.partial(_prepare_or_say, contract=contract)
    chunks = (
        tuple(source.pictures[first : first + EXAMINED_TOGETHER])
        for first in range(0, len(source), EXAMINED_TOGETHER)
    )
    with Examiner() as alone:

        def rescue(pictures: tuple[Picture, ...]) -> list[NDArray[np.uint8] | str]:
            found = alone.examine(Chunk(pictures, contract.size_px, False, PICTURE_LIMIT_S))
            return [
                finding if isinstance(finding, str) else function((picture,))[0]
                for picture, finding in zip(pictures, found, strict=True)
            ]

        if all(isinstance(picture, np.ndarray) for picture in source.pictures):
            for pictures in chunks:  # pixels in memory: sending them costs more than it saves
                yield from function(pictures)
            return
        for answers in pool.stream(function, chunks, rescue=rescue):
            yield from answers


def _prepare_or_say(
    pictures: tuple[Picture, ...], contract: InputContract
) -> list[NDArray[np.uint8] | str]:
    found: list[NDArray[np.uint8] | str] = []
    side = contract.size_px if contract.crop_fraction == 1 else -1
    whole = (side, side, 3)
    for picture in pictures:
        try:
            if isinstance(picture, np.ndarray) and picture.shape == whole:
                found.append(picture)  # what resizing it to its own size would give
                continue
            with limited(PICTURE_LIMIT_S):
                found.append(prepared_picture(picture, contract))
        except ImageRejected as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"the file cannot be opened: {error.strerror or error}")
    return found


def _prepare(part: ImageSource, contract: InputContract) -> NDArray[np.uint8]:
    return part.prepared(range(len(part)), contract)


def _check_skipped(skipped: Sequence[Skipped], found: int, allowed: float) -> None:
    if len(skipped) <= allowed * found:
        return
    named = "; ".join(f"{file.id}: {file.reason}" for file in skipped[:NAMED_IN_ERRORS])
    more = f"; and {len(skipped) - NAMED_IN_ERRORS} more" if len(skipped) > NAMED_IN_ERRORS else ""
    raise DataError(
        f"{len(skipped)} of {found} images cannot be used, more than the {allowed:.0%} that "
        f"data.max_skipped allows: {named}{more}. Repair or remove them, or raise data.max_skipped"
    )
