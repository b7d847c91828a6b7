"""Short numbers by which processes find out whether they hold the same: code, tensors.

In: this package's sources, or tensors where they lie. Out: hashes that differ when anything does.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

DIGEST_BLOCK = 2**22  # numbers of a tensor that are hashed at a time: 32 MB as int64


def code_digest() -> str:
    """sha256 over the sources of this package."""
    root = Path(__file__).parent
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@torch.no_grad()
def digest(tensors: Sequence[Tensor]) -> Tensor:
    """A fingerprint of float32 and int64 tensors, 0-d int64, computed where they lie.

    One differing bit changes it. No protection against malice.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        total = total * 31 + digest_of_part(tensor)  # 31: the tensors have an order
    return total


@torch.no_grad()
def digest_of_part(tensor: Tensor, *, first_row: int = 0) -> Tensor:
    """What some rows of a tensor add to its digest, 0-d int64: the parts of a tensor sum up to it.

    The sum of all bits, weighted by place, in integers that wrap: exact in any order of summation,
    and one differing bit changes it (the weights are odd).

    Args:
        tensor: rows `first_row`, `first_row` + 1, ... of a float32 or int64 tensor.
    """
    bits = tensor.detach().contiguous().view(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    before = first_row * (len(bits) // len(tensor)) if tensor.ndim and len(tensor) else 0
    for start in range(0, len(bits), DIGEST_BLOCK):
        block = bits[start : start + DIGEST_BLOCK].long()
        first = before + start
        weights = 2 * torch.arange(first, first + len(block), device=bits.device) + 1
        total = total + (block * weights).sum()
    return total
