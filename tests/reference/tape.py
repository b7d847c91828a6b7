"""A stand-in for CUDA graphs on the CPU: operations are written down and done again.

As with a CUDA graph, only operations on tensors are recorded, with the addresses of what they read
and write: whatever Python computes beside them is frozen, and what would have to wait for the
device, or gives a shape that depends on values, is refused. Tests capture training steps with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Body = Callable[[], None]
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class WaitsForTheDevice(AssertionError):
    """An operation that no CUDA graph can hold."""


class _Recording(TorchDispatchMode):
    def __init__(self, *, keeps: bool = True) -> None:
        super().__init__()
        self._keeps = keeps
        self.calls: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []
        self._made: set[int] = set()  # storages that were made while recording
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        masks = name.startswith("index") and any(each.dtype == torch.bool for each in given[1:])
        if any(name.startswith(each) for each in WAITING) or masks:
            raise WaitsForTheDevice(str(function))
        if not self._keeps:
            return function(*args, **(kwargs or {}))
        for each in given:
            address = each.untyped_storage().data_ptr()
            if address not in self._made and address not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(each.untyped_storage())
                self._before[address] = (whole, whole.clone())
        result = function(*args, **(kwargs or {}))
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        inputs = {each.untyped_storage().data_ptr() for each in given}
        fresh = [each.untyped_storage().data_ptr() not in inputs for each in outputs]
        self._made |= {
            each.untyped_storage().data_ptr()
            for each, is_fresh in zip(outputs, fresh, strict=True)
            if is_fresh
        }
        # Holding the outputs holds their addresses.
        self.calls.append((function, args, kwargs or {}, outputs, fresh))
        return result

    def undo(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)


class TapeGraphs:
    """What `trainer.capture.Graphs` asks for; counts what it was asked."""

    def __init__(self) -> None:
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, body: Body, times: int) -> None:
        for _ in range(times):
            self.warm_ups += 1
            body()

    def capture(self, body: Body) -> Body:
        self.captures += 1
        recording = _Recording()
        with recording:
            body()
        with torch.no_grad():
            recording.undo()

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for function, args, kwargs, outputs, fresh in recording.calls:
                again = [
                    each
                    for each in tree_leaves(function(*args, **kwargs))
                    if isinstance(each, Tensor)
                ]
                for old, new, is_fresh in zip(outputs, again, fresh, strict=True):
                    if is_fresh:
                        old.copy_(new)

        return replay


def never_waits() -> TorchDispatchMode:
    """While entered, an operation that would have to wait for the device is refused."""
    return _Recording(keeps=False)
