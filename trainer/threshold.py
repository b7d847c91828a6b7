"""The M-th largest of numbers that lie on several ranks, found exactly by nothing but counting.

In: each rank's numbers, as integers of the same order. Out: the threshold that M of all numbers
reach, and which of a rank's own are among the M. Pure: who sums counts over the ranks calls these.

A radix select: in each of 8 rounds every rank counts how many of its numbers reach each of 15
bounds, the counts are summed, and 4 more bits of the threshold are known. With 8 bits at a time it
would be 4 rounds, and eight times the bytes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGIT_BITS = 4
BOUNDS = 2**DIGIT_BITS - 1
SHIFTS = tuple(range(32 - DIGIT_BITS, -1, -DIGIT_BITS))  # of the rounds, in their order
LOWEST_KEY = -(2**31)
WORD_BITS = 64


class Bracket(NamedTuple):
    """Where the thresholds of B queries lie, the same on every rank; at last they are `low`."""

    low: Tensor  # (B,) int32
    above: Tensor  # (B,) int64, how many of all numbers lie past the bracket


def order_keys(similarities: Tensor) -> Tensor:
    """float32 -> int32 in the same order; 0.0 and -0.0 are equal, as they are as numbers."""
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    turned = (bits >> 31).bitwise_and_(0x7FFFFFFF)  # the order of negative ones is turned round
    return bits.bitwise_xor_(turned)


def ascending(keys: Tensor) -> Tensor:
    """(B, m) int32 -> each row sorted."""
    if keys.device.type == "cpu":  # without the places that torch sorts along: a twentieth the time
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(dim=1).values


def everywhere(batch: int, device: torch.device) -> Bracket:
    """The bracket to begin with: nothing is known."""
    low = torch.full((batch,), LOWEST_KEY, dtype=torch.int32, device=device)
    return Bracket(low, torch.zeros(batch, dtype=torch.int64, device=device))


def counts_of_round(sorted_keys: Tensor, bracket: Bracket, shift: int) -> Tensor:
    """How many of a rank's own numbers reach each bound of this round.

    Args:
        sorted_keys: (B, m) int32, each row ascending.
        shift: of this round, see SHIFTS.

    Returns:
        (B, BOUNDS) int64, to be summed over the ranks.
    """
    steps = torch.arange(1, BOUNDS + 1, device=sorted_keys.device, dtype=torch.int32) << shift
    bounds = bracket.low[:, None] + steps  # never past the largest int32
    return sorted_keys.shape[1] - torch.searchsorted(sorted_keys, bounds)


def narrowed(bracket: Bracket, counts: Tensor, shift: int, wanted: int) -> Bracket:
    """The bracket after a round.

    Args:
        counts: (B, BOUNDS) int64 of all ranks together.
        wanted: M >= 1; at most as many numbers as there are.
    """
    digit = (counts >= wanted).sum(dim=1)  # (B,) how many bounds M numbers reach
    above = torch.cat([counts, bracket.above[:, None]], dim=1).gather(1, digit[:, None])[:, 0]
    return Bracket(bracket.low + (digit << shift).to(torch.int32), above)


def packed(counts: Tensor, largest: int) -> Tensor:
    """Several counts in one int64 each, so that summing the words sums the counts.

    Args:
        counts: (B, C) int64, 0 or more.
        largest: what no sum over the ranks exceeds.

    Returns:
        (B, fewer) int64. The uppermost field may reach the sign, which does no harm.
    """
    bits, fields = _fields(largest)
    padded = torch.nn.functional.pad(counts, (0, -counts.shape[1] % fields))
    padded = padded.view(len(counts), -1, fields)
    words = padded[:, :, 0].clone()
    for field in range(1, fields):
        words |= padded[:, :, field] << (field * bits)
    return words


def unpacked(words: Tensor, count: int, largest: int) -> Tensor:
    """The (B, count) int64 sums that `packed` words of all ranks, summed, hold."""
    bits, fields = _fields(largest)
    mask = 2**bits - 1
    columns = [(words >> (field * bits)) & mask for field in range(fields)]
    return torch.stack(columns, dim=2).view(len(words), -1)[:, :count]


def ties_taken(ties: Tensor, above: Tensor, rank: int, wanted: int) -> Tensor:
    """How many of a rank's own numbers that equal the threshold are among the M: lowest ids first.

    Args:
        ties: (R, B) how many each rank has; the ranks' ids are in their order.
        above: (B,) numbers past the threshold, of all ranks.

    Returns:
        (B,), between 0 and ties[rank].
    """
    left = wanted - above - ties[:rank].sum(dim=0)
    return torch.minimum(left.clamp(min=0), ties[rank])


def among_largest(keys: Tensor, threshold: Tensor, taken: Tensor) -> Tensor:
    """(B, m) bool: which of a rank's own numbers are among the M of all.

    Args:
        keys: (B, m) int32 in the order of their ids.
        threshold: (B,) int32.
        taken: (B,) of `ties_taken`.
    """
    equal = keys == threshold[:, None]
    place = equal.cumsum(dim=1, dtype=torch.int32)
    return (keys > threshold[:, None]) | (equal & (place <= taken[:, None]))


def _fields(largest: int) -> tuple[int, int]:
    """Bits of a count and how many counts a word takes."""
    bits = max(1, largest.bit_length())
    return bits, max(1, WORD_BITS // bits)
