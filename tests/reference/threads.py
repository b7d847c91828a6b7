"""Ranks that are threads of one process: what they say to each other, counted.

In: a function of a rank. Out: what it returned on each of R ranks that ran it together.
"""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Meeting:
    """Where R threads put down what each has and take up what all have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.table: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.table[rank] = value
        self.barrier.wait()
        values = list(self.table)
        self.barrier.wait()
        return values


class Threads:
    """The exchange of `trainer.sharded_objective`, of one of R threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.payload: Counter[str] = Counter()  # bytes that all hold afterwards, by kind
        self.calls: Counter[str] = Counter()

    @property
    def size(self) -> int:
        return self.meeting.size

    def joined(self, *parts: Tensor) -> list[Tensor]:
        values = self.meeting.exchange(self.rank, [part.detach().clone() for part in parts])
        found = [torch.cat(each) for each in zip(*values, strict=True)]
        return self._count("joined", found)

    def summed(self, own: Tensor) -> Tensor:
        values = self.meeting.exchange(self.rank, own.clone())
        return self._count("summed", [torch.stack(values).sum(dim=0)])[0]

    def share_of_sum(self, own: Tensor) -> Tensor:
        total = torch.stack(self.meeting.exchange(self.rank, own.clone())).sum(dim=0)
        self._count("share of sum", [total])
        return total.chunk(self.size)[self.rank].clone()

    def _count(self, kind: str, tensors: list[Tensor]) -> list[Tensor]:
        self.payload[kind] += sum(each.numel() * each.element_size() for each in tensors)
        self.calls[kind] += 1
        return tensors


def together(size: int, function: Callable[[Threads], Result]) -> list[Result]:
    """Call `function` on every rank at once; an error of one is raised here."""
    meeting = Meeting(size)

    def run(rank: int) -> Result:
        try:
            return function(Threads(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        broken: list[threading.BrokenBarrierError] = []
        results = []
        for future in futures:
            try:
                results.append(future.result())
            except threading.BrokenBarrierError as error:
                broken.append(error)
        if broken:
            raise broken[0]
    return results
