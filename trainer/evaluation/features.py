"""What a frozen encoder says of the images of a split: computed once, kept, verified when read.

In: a network, a split, names of outputs. Out: float32 rows for the images that can be decoded.
Nothing here sees a label.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.datasets import DataError, Skipped
from trainer.decoding import prepared_or_reasons
from trainer.encoder import pixels_from_uint8
from trainer.evaluation.context import Evaluation, Network
from trainer.evaluation.dataset_specs import TRAIN
from trainer.evaluation.labelled import fingerprint_of
from trainer.evaluation.layers import Encode, encode_with
from trainer.representation.artifact import ArtifactError, open_artifact, write_artifact

EMBEDDED_TOGETHER = 64  # images in one forward pass
NAMED_IN_ERRORS = 5
_SCHEMA = "invprop.features/1"


class Extracted(NamedTuple):
    """Rows of a split that could be decoded, and what the network says of them."""

    rows: NDArray[np.int64]  # (M,) ascending places in the split
    values: dict[str, NDArray[np.float32]]  # output: (M, F)


def extract(
    evaluation: Evaluation, network: Network, split: str, outputs: Sequence[str]
) -> Extracted:
    """What the network says of a split's images, from the cache where it is there and whole.

    Raises:
        DataError: more images are broken than the data set allows; names some.
    """
    found: dict[str, _Entry] = {}
    for output in outputs:
        entry = _read(_place(evaluation, network, split, output))
        if entry is not None:
            found[output] = entry
    missing = [output for output in outputs if output not in found]
    if missing:
        found |= _computed(evaluation, network, split, missing)
    first = found[outputs[0]]
    evaluation.skipped[split] = first.skipped
    _check_skipped(evaluation, split, first.skipped)
    return Extracted(first.rows, {output: found[output].values for output in outputs})


def usable_images(
    evaluation: Evaluation,
    split: str,
    rows: list[int],
    *,
    asked: NDArray[np.int64] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """(S, S, 3) as the bundle wants it, for each image of a split that can be decoded.

    Args:
        rows: is given the place in the split of each image.
        asked: ascending places in the split; None: all.

    Raises:
        DataError: none can be used, or more are broken than the data set allows; names some.
    """
    source = evaluation.dataset.splits[split].source
    places = np.arange(len(source)) if asked is None else asked
    skipped = list(source.skipped)
    answers = prepared_or_reasons(
        source if asked is None else source.subset(asked),
        evaluation.bundle.contract,
        evaluation.pool,
    )
    for row, answer in zip(places, answers, strict=True):
        if isinstance(answer, str):
            skipped.append(Skipped(source.ids[row], answer))
            _check_skipped(evaluation, split, skipped)
        else:
            rows.append(int(row))
            yield answer
    evaluation.skip(split, skipped)
    if not rows:
        raise DataError(
            f"data set {evaluation.dataset.name}: none of the {len(places)} images of {split} can "
            f"be used{_named(skipped)}"
        )


def embed_all(
    images: Iterable[NDArray[np.uint8]],
    encode: Encode,
    *,
    device: torch.device,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, NDArray[np.float32]]:
    """(N, F) for each output of images (S, S, 3), `EMBEDDED_TOGETHER` at a time."""
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for batch in _batches(images):
        pixels = pixels_from_uint8(torch.from_numpy(batch).to(device))
        for name, rows in encode(pixels).items():
            parts.setdefault(name, []).append(rows.cpu().numpy())
        advance(len(batch))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def labels_of(evaluation: Evaluation, split: str, extracted: Extracted) -> NDArray[np.int64]:
    """(M,) classes of the rows that could be decoded.

    Raises:
        DataError: no image of a class is left in `train`; JobError: an image has several classes.
    """
    dataset = evaluation.dataset
    labels = dataset.splits[split].labels[extracted.rows]
    gone = np.flatnonzero(np.bincount(labels, minlength=len(dataset.class_names)) == 0)
    if split == TRAIN and len(gone):
        raise DataError(
            f"data set {dataset.name}: no training image of the class "
            f"{dataset.class_names[gone[0]]!r} can be used; repair them, or remove the class"
        )
    return labels


class _Entry(NamedTuple):
    """One output of one split, as it is kept."""

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    skipped: tuple[Skipped, ...]


def _computed(
    evaluation: Evaluation, network: Network, split: str, outputs: Sequence[str]
) -> dict[str, _Entry]:
    total = len(evaluation.dataset.splits[split])
    stage, done = f"{_said(network)} features of {split}", 0
    rows: list[int] = []

    def advance(count: int) -> None:
        nonlocal done
        done += count
        evaluation.progress(stage, done, total)

    evaluation.progress(stage, 0, total)
    values = embed_all(
        usable_images(evaluation, split, rows),
        encode_with(network.encoder, outputs),
        device=evaluation.device,
        advance=advance,
    )
    skipped = evaluation.skipped[split]
    entries = {
        output: _Entry(np.array(rows, np.int64), values[output], skipped) for output in outputs
    }
    for output, entry in entries.items():
        _write(_place(evaluation, network, split, output), entry)
    return entries


def _place(evaluation: Evaluation, network: Network, split: str, output: str) -> Path:
    key = f"{network.key} {fingerprint_of(evaluation.dataset.splits[split])} {output}"
    contract = json.dumps(evaluation.bundle.contract.as_dict(), sort_keys=True)
    # Rows of another kind of device are close to these, and not the same numbers.
    key = f"{_SCHEMA} {key} {contract} {evaluation.device.type}"
    return evaluation.cache / hashlib.sha256(key.encode()).hexdigest()


def _write(place: Path, entry: _Entry) -> None:
    def bytes_of(array: NDArray[np.generic]) -> bytes:
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        return content.getvalue()

    write_artifact(
        place,
        {"rows.npy": bytes_of(entry.rows), "values.npy": bytes_of(entry.values)},
        {"schema": _SCHEMA, "skipped": [list(each) for each in map(_pair, entry.skipped)]},
    )


def _read(place: Path) -> _Entry | None:
    """None where nothing is kept, or what is kept is damaged: then it is computed anew."""
    if not place.exists():
        return None
    try:
        manifest = open_artifact(place)
    except ArtifactError:
        return None
    rows, values = (
        np.load(place / f"{name}.npy", allow_pickle=False) for name in ("rows", "values")
    )
    return _Entry(rows, values, tuple(Skipped(*each) for each in manifest["skipped"]))


def _pair(skipped: Skipped) -> tuple[str, str]:
    return skipped.id, skipped.reason


def _batches(images: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    batch: list[NDArray[np.uint8]] = []
    for image in images:
        batch.append(image)
        if len(batch) == EMBEDDED_TOGETHER:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _check_skipped(evaluation: Evaluation, split: str, skipped: Sequence[Skipped]) -> None:
    dataset = evaluation.dataset
    source = dataset.splits[split].source
    total = len(source) + len(source.skipped)
    if len(skipped) > dataset.max_skipped * total:
        raise DataError(
            f"data set {dataset.name}: {len(skipped)} of {total} images of {split} cannot be used, "
            f"more than the {dataset.max_skipped:.0%} that max_skipped allows"
            f"{_named(skipped)}. Repair or remove them, or raise max_skipped"
        )


def _named(skipped: Sequence[Skipped]) -> str:
    named = "; ".join(f"{file.id}: {file.reason}" for file in skipped[:NAMED_IN_ERRORS])
    more = len(skipped) - NAMED_IN_ERRORS
    return f": {named}" + (f"; and {more} more" if more > 0 else "")


def _said(network: Network) -> str:
    return "untrained" if network.key.startswith("untrained") else "frozen"
