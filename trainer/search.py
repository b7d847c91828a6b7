"""The one pass over the memory bank that a training step makes: its M nearest rows, in blocks.

In: fresh embeddings (B, D) and the bank (N, D). Out: ids and similarities of the M best rows of
each, without ever holding (B, N). No gradient: the losses need only what is found here.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Similarities held at a time: B = 128 against N = 50,000 in one block; smaller ones cost calls.
BLOCK_BYTES = 32 * 2**20

# One column in 16 gives a bound near the M-th best, so that only about M of N columns are selected
# from (measured: 10 ms instead of 14 ms for B = 128, N = 50,000, M = 4096).
SAMPLE_STRIDE = 16
SAMPLE_MARGIN = 1.15
# numpy lists the true entries of a mask without branches only where more than a tenth are true;
# near that density this is four times as fast, so some more than needed are let through.
DENSE_SHARE = 0.115

TILE = 64  # columns of which `nearest` takes the maximum at once


class TopM(NamedTuple):
    """The M bank rows of highest similarity to each of B queries; M is lowered to N."""

    ids: Tensor  # (B, M) int64, ascending in each row, so that membership is a binary search
    similarities: Tensor  # (B, M), in the order of `ids`


@torch.no_grad()
def top_m(queries: Tensor, bank: Tensor, m: int, *, block_rows: int | None = None) -> TopM:
    """Find the m bank rows of highest inner product with each query, exactly.

    Of equal similarities at the m-th place the lowest ids are taken (on the CPU; elsewhere torch
    decides, which changes no loss, for equal similarities weigh the same).

    Args:
        queries: (B, D) of the bank's dtype.
        bank: (N, D).
        m: how many, >= 1; lowered to N.
        block_rows: bank rows compared at a time; by default BLOCK_BYTES of similarities.
    """
    m = min(m, len(bank))
    if block_rows is None:
        block_rows = max(1, BLOCK_BYTES // (queries.element_size() * max(1, len(queries))))
    block_rows = min(block_rows, len(bank))
    if queries.device.type == "cpu":
        return _top_m_on_cpu(queries, bank, m, block_rows)
    return _top_m_on_device(queries, bank, m, block_rows)


def nearest(found: TopM, count: int) -> Tensor:
    """The `count` best ids of each row, best first; equal ones by ascending id; -1 past the end.

    Args:
        found: (B, M) of each.
        count: a handful: each is one pass over the M.
    """
    batch, m = found.ids.shape
    # In tiles, because a maximum is vectorised and the place of a maximum is not: a fifth the time.
    tiles = nn.functional.pad(found.similarities, (0, -m % TILE), value=-torch.inf)
    tiles = tiles.view(batch, -1, TILE)
    rows = torch.arange(batch, device=tiles.device)
    picked = torch.full((batch, count), -1, dtype=torch.int64, device=tiles.device)
    for rank in range(min(count, m)):
        tile = tiles.amax(dim=2).argmax(dim=1)  # (B,) the first of equals: the lowest ids
        column = tiles[rows, tile].argmax(dim=1)
        picked[:, rank] = found.ids[rows, tile * TILE + column]
        tiles[rows, tile, column] = -torch.inf
    return picked


def places(found: TopM, ids: Tensor) -> Tensor:
    """(B, W) ids -> (B, W) the column of `found` in which each stands, M for one that does not."""
    width = found.ids.shape[1]
    place = torch.searchsorted(found.ids, ids)
    there = found.ids.gather(1, place.clamp(max=width - 1)) == ids
    return torch.where(there, place, width)


def _top_m_on_cpu(queries: Tensor, bank: Tensor, m: int, block_rows: int) -> TopM:
    batch = len(queries)
    scores = _scores(batch, block_rows, queries.dtype)
    ids = np.empty((batch, m), np.int64)
    similarities = np.empty((batch, m), scores.numpy().dtype)
    count = 0  # rows of the bank that compete so far, m at most
    for start in range(0, len(bank), block_rows):
        block = bank[start : start + block_rows]
        width = len(block)
        torch.mm(queries, block.T, out=scores[:, :width])
        lines = scores.numpy()[:, :width]
        for line, line_ids, line_similarities in zip(lines, ids, similarities, strict=True):
            _keep_best(line, start, count, line_ids, line_similarities)
        count = min(m, count + width)
    return TopM(torch.from_numpy(ids), torch.from_numpy(similarities))


def _keep_best(
    line: NDArray[np.floating],
    start: int,
    count: int,
    ids: NDArray[np.int64],
    similarities: NDArray[np.floating],
) -> None:
    """Merge scores of bank rows start, start + 1, ... into the best `count` so far, in place."""
    m, wanted = len(ids), len(ids) - count
    if wanted == 0:
        found = np.flatnonzero(line > similarities.min())  # an equal later one loses
    elif len(line) <= wanted:
        found = np.arange(len(line))
    else:
        found = np.flatnonzero(line >= _sampled_bound(line, m))
        if len(found) < wanted:
            found = np.flatnonzero(line >= np.partition(line, -wanted)[-wanted])
    best = line[found]
    if start:
        found = np.concatenate([ids[:count], found + start])
        best = np.concatenate([similarities[:count], best])
    surplus = len(found) - m
    if surplus > 0:
        threshold = np.partition(best, surplus)[surplus]
        keep = np.flatnonzero(best >= threshold)
        if len(keep) > m:  # ties at the threshold: the highest ids go
            tied = np.flatnonzero(best[keep] == threshold)
            keep = np.delete(keep, tied[m - len(keep) :])
        # Straight to their place: with the default mode numpy would go through a copy.
        found.take(keep, out=ids, mode="clip")
        best.take(keep, out=similarities, mode="clip")
    else:
        ids[: len(found)] = found
        similarities[: len(found)] = best


def _sampled_bound(line: NDArray[np.floating], m: int) -> float:
    """A guess, from every 16th entry, at a value that m entries reach and not many more do."""
    sample = line[::SAMPLE_STRIDE].copy()
    expected = m * SAMPLE_MARGIN + SAMPLE_STRIDE**2  # entries let through
    if expected < DENSE_SHARE * len(line) < 2 * m:
        expected = DENSE_SHARE * len(line)
    rank = min(len(sample), int(expected / SAMPLE_STRIDE))
    sample.partition(len(sample) - rank)
    return float(sample[len(sample) - rank])


_per_thread = threading.local()


def _scores(batch: int, block_rows: int, dtype: torch.dtype) -> Tensor:
    """The block of similarities, the same memory in every step (fresh pages cost 3 ms a step)."""
    held: Tensor | None = getattr(_per_thread, "scores", None)
    if held is None or held.shape != (batch, block_rows) or held.dtype != dtype:
        held = _per_thread.scores = torch.empty(batch, block_rows, dtype=dtype)
    return held


def _top_m_on_device(queries: Tensor, bank: Tensor, m: int, block_rows: int) -> TopM:
    ids: Tensor | None = None
    similarities = queries.new_empty(len(queries), 0)
    for start in range(0, len(bank), block_rows):
        scores = queries @ bank[start : start + block_rows].T
        best = scores.topk(min(m, scores.shape[1]), dim=1, sorted=False)
        similarities = torch.cat([similarities, best.values], dim=1)
        ids = best.indices if ids is None else torch.cat([ids, best.indices + start], dim=1)
        if similarities.shape[1] > m:
            top = similarities.topk(m, dim=1, sorted=False)
            similarities, ids = top.values, ids.gather(1, top.indices)
    assert ids is not None
    ids, order = ids.sort(dim=1)
    return TopM(ids, similarities.gather(1, order))
