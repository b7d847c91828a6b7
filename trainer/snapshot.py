"""The tensors of a run as they were at one step, held on the host while training goes on.

In: named tensors on any device. Out: copies in buffers that are used again for each snapshot (one
extra copy of the state, no more), and these as the bytes of safetensors files, piece by piece.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Bytes that are hashed and written at a time: large, as other threads wait for Python between two
# pieces only, and small beside the state, as the check for numbers makes a copy of one.
PIECE_BYTES = 4 * 2**20

# safetensors: what a file calls the types, and how many bytes its header is filled up to.
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_MULTIPLE = 8

# The bits of the exponent. All set means infinite or no number: no type of numpy's is needed, which
# has no bfloat16.
_EXPONENTS = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Snapshot:
    """Copies of the tensors of each file, whole once `wait` has returned."""

    files: Mapping[str, Mapping[str, Tensor]]
    copied: torch.cuda.Event | None  # None: they were on the host

    def wait(self) -> None:
        """Wait until a GPU has copied everything."""
        if self.copied is not None:
            self.copied.synchronize()


class HostCopies:
    """Buffers on the host for one snapshot at a time; taking the next one overwrites them.

    Next to a GPU they are page-locked (torch takes powers of two of that: up to twice the state).
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> Snapshot:
        """Copy the tensors of each file.

        From a GPU the host does not wait: the copies are queued on the current stream, so that what
        it is told to do next, a step that changes the state, comes after them.
        """
        kept, self._buffers = self._buffers, {}
        copies: dict[str, dict[str, Tensor]] = {}
        on_gpu = False
        for file, tensors in files.items():
            copies[file] = {}
            for name, tensor in tensors.items():
                own = tensor.detach()
                buffer = kept.pop((file, name), None)
                if buffer is None or not _same_form(buffer, own):
                    # Of the same memory format, so that a copy is one run over memory.
                    buffer = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
                buffer.copy_(own, non_blocking=True)
                self._buffers[file, name] = copies[file][name] = buffer
                on_gpu = on_gpu or own.is_cuda
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return Snapshot(copies, copied)


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file of tensors on the host, none of them copied as a whole but those
    that are not contiguous, one at a time.

    In plain numpy: torch would start a second team of threads beside that of the training steps.
    """
    # The widest elements first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, first = {}, 0
    for name, tensor in ordered:
        last = first + tensor.nbytes
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, last],
        }
        first = last
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _HEADER_MULTIPLE)
    yield len(content).to_bytes(8, "little") + content
    for _, tensor in ordered:
        yield from _pieces(_bits(tensor).view(np.uint8))


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor on the host that holds an infinite value or no number."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _EXPONENTS:
            continue
        bits = _array(tensor).ravel(order="K")  # in whatever order they lie: nothing is copied
        mask = bits.dtype.type(_EXPONENTS[tensor.dtype])
        elements = PIECE_BYTES // bits.itemsize
        for first in range(0, len(bits), elements):
            if ((bits[first : first + elements] & mask) == mask).any():
                return name
    return None


def _same_form(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def _bits(tensor: Tensor) -> NDArray[Any]:
    """(elements,) in the order of the indices, as whole numbers of the elements' size."""
    return np.ascontiguousarray(_array(tensor)).reshape(-1)


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.view(_BITS[tensor.element_size()]).numpy()
    return array


def _pieces(content: NDArray[np.uint8]) -> Iterator[memoryview]:
    for first in range(0, len(content), PIECE_BYTES):
        yield content[first : first + PIECE_BYTES].data
