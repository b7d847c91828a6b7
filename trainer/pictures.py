"""Which images are shown of an inspection: anchors with the positives nearest and farthest.

In: an inspection, ids and labels of the training images. Out: plain values for pictures.json. The
first anchors are those that were drawn first, before training began, so that nobody chose them;
the worst are what an unlucky look would find.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.inspection import Inspection

SHOWN_FIRST = 10  # anchors
SHOWN_WORST = 5
SHOWN_POSITIVES = 6  # at either end; with the anchors 195 thumbnails at most


def pictures(
    seen: Inspection, epoch: int, ids: Sequence[str], labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Describe some anchors of an inspection.

    Args:
        ids: N names of the training images.
        labels: (N,) their classes; None where there are none.

    Returns:
        JSON values: `epoch`, `first` and `worst` anchors with `nearest` and `farthest` positives,
        each with seat, id, label or null, similarity, hop and whether it is a chosen one. Worst are
        the anchors with the fewest positives of their class, without labels those whose positives
        are least similar; anchors that are among the first, or reach nobody, are not among them.
    """
    same = None if labels is None else seen.same_label(labels)
    there = seen.reached >= 0
    many = np.maximum(there.sum(axis=1), 1)
    goodness = (seen.similarities * there).sum(axis=1) / many
    if same is not None:
        goodness = same.sum(axis=1) / many
    order = [int(row) for row in np.argsort(goodness, kind="stable") if there[row].any()]
    worst = [row for row in order if row >= SHOWN_FIRST][:SHOWN_WORST]

    def described(seat: int) -> dict[str, Any]:
        label = None if labels is None else int(labels[seat])
        return {"seat": seat, "id": ids[seat], "label": label}

    def anchor(row: int) -> dict[str, Any]:
        columns = np.flatnonzero(there[row])
        by_similarity = columns[np.argsort(-seen.similarities[row, columns], kind="stable")]
        far = min(SHOWN_POSITIVES, len(columns) // 2)
        near = min(SHOWN_POSITIVES, len(columns) - far)

        def positive(column: int) -> dict[str, Any]:
            return {
                **described(int(seen.reached[row, column])),
                "similarity": round(float(seen.similarities[row, column]), 4),
                "hop": int(seen.hops[row, column]),
                "chosen": bool(seen.chosen[row, column]),
            }

        return {
            **described(int(seen.anchors[row])),
            "reached": len(columns),
            "chosen": int(seen.chosen[row].sum()),
            "of_its_class": None if same is None else int(same[row].sum()),
            "nearest": [positive(column) for column in by_similarity[:near]],
            "farthest": [positive(column) for column in by_similarity[::-1][:far]],
        }

    return {
        "epoch": epoch,
        "first": [anchor(row) for row in range(min(SHOWN_FIRST, len(seen.anchors)))],
        "worst": [anchor(row) for row in worst],
    }
