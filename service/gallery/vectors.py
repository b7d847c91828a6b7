"""What a vector of the gallery is: finite, of the model's dimension, of unit length.

In: numbers from a request. Out: float32 rows of unit length, or the reason why one is none.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from service.gallery.protocol import Vectors

# A float32 row this close to unit length is kept bit for bit, so that a vector that was fetched
# from /embed and is sent back does not change.
UNIT_KEPT = 1e-5


def as_unit(values: Sequence[float] | Any, dim: int) -> Vectors:
    """Bring one vector to float32 of unit length.

    Args:
        values: `dim` numbers, a list or an array.

    Raises:
        ValueError: other than `dim` numbers, not finite, or of length zero; says what was got.
    """
    try:
        given = np.asarray(values)
    except ValueError:  # lists of different lengths
        given = np.asarray(None)
    if given.dtype.kind not in "fiu" or given.shape != (dim,):
        numbers = given.dtype.kind in "fiu" and given.ndim == 1
        what = f"{len(given)}" if numbers else "no list of numbers"
        raise ValueError(f"a vector of this model is {dim} numbers, got {what}")
    exact = given.astype(np.float64)
    with np.errstate(over="ignore"):  # seen as an infinite length below
        length = math.sqrt(np.vecdot(exact, exact))
    if not np.isfinite(length):
        raise ValueError("the vector holds NaN, infinity or values beyond any embedding")
    if length == 0:
        raise ValueError("the vector has length 0 and thus no direction")
    if abs(length - 1) > UNIT_KEPT:
        exact /= length
    return cast(Vectors, exact.astype(np.float32))


def as_unit_rows(values: Sequence[Any] | Any, dim: int) -> Vectors | None:
    """Bring n vectors to float32 of unit length at once, as `as_unit` does one by one.

    Args:
        values: n >= 1 vectors of `dim` numbers.

    Returns:
        (n, dim); None when one of them is none: `as_unit` says which and why.
    """
    if not isinstance(values, np.ndarray):
        try:
            rows = [np.asarray(value) for value in values]
        except ValueError:  # lists of different lengths
            return None
        if any(row.dtype.kind not in "fiu" or row.shape != (dim,) for row in rows):
            return None
        values = np.stack(rows)
    given = np.asarray(values)
    if given.dtype.kind not in "fiu" or given.ndim != 2 or given.shape[1] != dim:
        return None
    exact = given.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # seen as an infinite length below
        lengths = np.sqrt(np.vecdot(exact, exact))
    # Few numpy calls: for one vector each of them takes longer than what it computes.
    shortest, longest = float(lengths.min()), float(lengths.max())
    if not (shortest > 0 and longest < math.inf):  # as with NaN
        return None
    if shortest < 1 - UNIT_KEPT or longest > 1 + UNIT_KEPT:
        off = np.abs(lengths - 1) > UNIT_KEPT
        exact[off] /= lengths[off, None]
        return cast(Vectors, exact.astype(np.float32))
    return np.ascontiguousarray(given, np.float32)


def cosine(queries: Vectors, vectors: Vectors) -> Vectors:
    """(n, D), (n, D) of unit length -> (n,) float32 in [-1, 1], summed in float64."""
    products = np.einsum("nd,nd->n", queries.astype(np.float64), vectors.astype(np.float64))
    return cast(Vectors, products.clip(-1, 1).astype(np.float32))
