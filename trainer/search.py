"""The one pass over the memory bank that a training step makes: its M nearest rows, in blocks.

In: fresh embeddings (B, D) and the bank (N, D). Out: ids and similarities of the M best rows of
each, without ever holding (B, N). No gradient: the losses need only what is found here.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Similarities held at a time: B = 128 against N = 50,000 in one block; smaller ones cost calls.
BLOCK_BYTES = 32 * 2**20

# The same on a GPU, where fewer, larger blocks select from fewer entries: N = 1,281,167, B = 256 is
# six blocks and CIFAR-10 is one (unmeasured on a GPU; tests/gpu/bench_trainer.py tries others).
DEVICE_BLOCK_BYTES = 256 * 2**20
LEAST_TILE = 4  # smaller ones would leave hardly fewer entries than there are

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

    Of equal similarities at the m-th place the lowest ids are taken.

    Args:
        queries: (B, D) of the bank's dtype.
        bank: (N, D).
        m: how many, >= 1; lowered to N.
        block_rows: bank rows compared at a time; by default BLOCK_BYTES of similarities on the CPU
            and DEVICE_BLOCK_BYTES elsewhere.
    """
    m = min(m, len(bank))
    on_cpu = queries.device.type == "cpu"
    if block_rows is None:
        limit = BLOCK_BYTES if on_cpu else DEVICE_BLOCK_BYTES
        block_rows = max(1, limit // (queries.element_size() * max(1, len(queries))))
    block_rows = min(block_rows, len(bank))
    if on_cpu:
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
    # Given back before the losses need memory: they take no more than this block did, and
    # trainer.host_memory keeps its pages for the next step (fresh ones cost 3 ms).
    scores = torch.empty(batch, block_rows, dtype=queries.dtype)
    ids = np.zeros((batch, m), np.int64)  # rows that exist, where no comparison is true (NaN)
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


def _top_m_on_device(queries: Tensor, bank: Tensor, m: int, block_rows: int) -> TopM:
    """The same with whole-matrix operations: no shape and no branch depends on a value.

    Similarities are full float32 products: on GPUs torch's own default, which `top_m` does not
    touch (TF32 or bf16 would pick other rows at the M-th place). Ids stay ascending throughout, so
    nothing is ever sorted.
    """
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    similarities = queries.new_empty(len(queries), 0)
    for start in range(0, len(bank), block_rows):
        scores = queries @ bank[start : start + block_rows].T  # (B, R)
        columns, best = _best_of_block(scores, min(m, scores.shape[1]))
        if start:
            ids = torch.cat([ids, columns + start], dim=1)
            similarities = torch.cat([similarities, best], dim=1)
            kept = _best_places(similarities, min(m, ids.shape[1]))
            ids, similarities = ids.gather(1, kept), similarities.gather(1, kept)
        else:
            ids, similarities = columns, best
    return TopM(ids, similarities)


def _best_of_block(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, R) -> (B, count) columns, ascending, and values of the largest; of equal ones the first.

    In a wide block the `count` best tiles by their maximum are found first: they hold all of the
    `count` best entries, since each of them has one that is at least as good as any outside. With
    tiles of sqrt(R / count) that leaves 2 sqrt(R count) entries to select from instead of R.
    """
    batch, width = scores.shape
    size = 2 ** round(math.log2(width / count) / 2)
    if size < LEAST_TILE:
        kept = _best_places(scores, count)
        return kept, scores.gather(1, kept)
    whole = width // size * size
    tiles = scores[:, :whole].view(batch, -1, size)  # (B, T, size)
    chosen = _best_places(tiles.amax(dim=2), count)  # (B, count)
    entries = tiles.gather(1, chosen[:, :, None].expand(-1, -1, size)).flatten(1)
    within = torch.arange(size, device=scores.device)
    columns = (chosen[:, :, None] * size + within).flatten(1)  # (B, count x size)
    if whole < width:  # what fills no tile
        rest = torch.arange(whole, width, device=scores.device).expand(batch, -1)
        entries = torch.cat([entries, scores[:, whole:]], dim=1)
        columns = torch.cat([columns, rest], dim=1)
    kept = _best_places(entries, count)
    return columns.gather(1, kept), entries.gather(1, kept)


def _best_places(values: Tensor, count: int) -> Tensor:
    """(B, R) -> (B, count) columns of the largest values, ascending; of equal ones the first."""
    width = values.shape[1]
    # The count-th best. Not by kthvalue, which on a GPU gives each row to one block of threads.
    least = values.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, tied = values > least, values == least
    spare = count - above.sum(dim=1, keepdim=True, dtype=torch.int32)  # how many ties fit
    fitting = tied & (tied.cumsum(dim=1, dtype=torch.int32) <= spare)
    rank = (above | fitting).cumsum(dim=1, dtype=torch.int32)  # the i-th kept one has rank i
    wanted = torch.arange(1, count + 1, device=values.device, dtype=torch.int32)
    columns = torch.searchsorted(rank, wanted.expand(len(values), -1).contiguous())
    # No number is above or equal to NaN: with one among them, columns past the end are asked for.
    return columns.clamp(max=width - 1)
