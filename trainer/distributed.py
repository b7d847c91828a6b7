"""The processes of one run: what each takes of a batch, what is joined and agreed.

In: how this process was launched. Out: `Ranks`, the only room that talks to other processes (batch
normalisation apart, trainer/batch_norm.py). With one process it does nothing at all: no group is
opened and every joined thing is what the process has itself.
"""

import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.batch_norm import joint_batch_norm
from trainer.launch import Launch, RankError, meeting_place

# What the ranks may wait for each other before training: one of them may still be reading images.
# 30 minutes is torch's own for gloo.
HOST_TIMEOUT = timedelta(minutes=30)
PIECE_BYTES = 64 * 2**20  # of a divided bank that travel at a time when it is saved or restored

Result = TypeVar("Result")


class FirstRankFailed(Exception):
    """Rank 0 could not do its part and has said why."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    launch: Launch
    group: dist.ProcessGroup | None = None  # of the training steps; None before it is opened
    host: dist.ProcessGroup | None = None  # of small things meanwhile; None: the first, patient one

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.launch.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone speaks and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of `count` things that is this rank's; the parts are in the ranks' order."""
        return self._share_of(self.rank, count)

    def gathered(self, value: Result) -> list[Result]:
        """The values of all ranks in their order, on every rank; pickled, so for small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0 alone and give its result to all.

        Raises:
            FirstRankFailed: on the others, when it raised on rank 0.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, False]
        try:
            if self.is_first:
                answer = [function(), True]
        finally:
            dist.broadcast_object_list(answer, src=0, group=self.host)
        if not answer[1]:
            raise FirstRankFailed
        result: Result = answer[0]
        return result

    def check_same(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Compare `facts` with those of the other ranks.

        Raises:
            RankError: on rank 0, naming what differs, where, and the `remedy`.
            FirstRankFailed: on the others, when it raised on rank 0.
        """
        everywhere = self.gathered(dict(facts))
        differing = []
        for name in sorted({name for each in everywhere for name in each}):
            holders: dict[str, list[int]] = {}
            for rank, each in enumerate(everywhere):
                holders.setdefault(json.dumps(each.get(name)), []).append(rank)
            if len(holders) > 1:
                differing.append(
                    f"{name} is "
                    + ", ".join(f"{value} on {_named(who)}" for value, who in holders.items())
                )
        if differing and not self.is_first:
            raise FirstRankFailed
        if differing:
            raise RankError(f"the processes differ: {'; '.join(differing)}. {remedy}")

    def joined(self, *parts: Tensor) -> list[Tensor]:
        """Join tensors along the first dimension in the order of the ranks, in one exchange.

        Args:
            parts: of the same shapes and dtypes on every rank and all on one device.

        Returns:
            for each (b, ...) the (size * b, ...) of all ranks, bit for bit, without gradient.
        """
        parts = tuple(part.detach() for part in parts)
        if self.size == 1:
            return list(parts)
        # As bytes: ids and numbers of any type travel together and none is rounded.
        words = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
        message = torch.cat(words)
        received = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(received, message, group=self.group)
        columns = torch.split(torch.stack(received), [len(word) for word in words], dim=1)
        return [
            column.contiguous().view(-1).view(part.dtype).view(-1, *part.shape[1:])
            for part, column in zip(parts, columns, strict=True)
        ]

    def summed(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors, of one shape and dtype, the same bits on every rank."""
        if self.size == 1:
            return own.detach()
        total = own.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def share_of_sum(self, own: Tensor) -> Tensor:
        """This rank's share of the first dimension of the sum of all ranks' tensors."""
        if self.size == 1:
            return own.detach()
        if own.device.type != "cuda" or len(own) % self.size:  # gloo and uneven shares: not there
            return self.summed(own)[self.share(len(own))]
        part = own.new_empty(len(own) // self.size, *own.shape[1:])
        dist.reduce_scatter_tensor(part, own.detach().contiguous(), group=self.group)
        return part

    def collect(self, own: Tensor, total: int) -> Tensor | None:
        """Bring the shares of `total` rows together on rank 0's host, through the host, in pieces.

        Returns:
            the rows of all on rank 0, None on the others.
        """
        if not self.is_first:
            for piece in _pieces(own, slice(0, len(own))):
                dist.send(own[piece].detach().cpu().contiguous(), dst=0)
            return None
        whole = torch.empty(total, *own.shape[1:], dtype=own.dtype)
        whole[self.share(total)] = own.detach().cpu()
        for rank in range(1, self.size):
            for piece in _pieces(own, self._share_of(rank, total)):
                dist.recv(whole[piece], src=rank)
        return whole

    @torch.no_grad()
    def hand_out(self, read: Callable[[slice], Tensor] | None, own: Tensor, total: int) -> None:
        """Fill each rank's share of `total` rows, through the host, in pieces.

        Args:
            read: gives rows on the host; called on rank 0 alone, None on the others.
            own: this rank's share, overwritten.
        """
        if read is None:
            for piece in _pieces(own, slice(0, len(own))):
                received = torch.empty_like(own[piece], device="cpu")
                dist.recv(received, src=0)
                own[piece] = received.to(own.device)
            return
        first = self.share(total)
        for piece in _pieces(own, first):
            own[piece.start - first.start : piece.stop - first.start] = read(piece).to(own.device)
        for rank in range(1, self.size):
            for piece in _pieces(own, self._share_of(rank, total)):
                dist.send(read(piece).contiguous(), dst=rank)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors in place with those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            dense = tensor.detach().contiguous()  # channels_last weights are not
            dist.broadcast(dense, src=0, group=self.group)
            with torch.no_grad():
                tensor.copy_(dense)

    def copy_optimiser_from_first(self, optimiser: torch.optim.Optimizer) -> None:
        """Give rank 0's state of the optimiser to all."""
        if self.size == 1:
            return
        content = io.BytesIO()
        torch.save(optimiser.state_dict(), content)
        received = io.BytesIO(self.from_first(content.getvalue))
        optimiser.load_state_dict(torch.load(received, map_location="cpu", weights_only=True))

    @contextmanager
    def network(self, encoder: nn.Module, *, sync_batchnorm: bool) -> Iterator[nn.Module]:
        """Yield what to call in training, whose gradients are means over the ranks.

        The encoder itself stays the one to save and to export.
        """
        if self.size == 1:
            yield encoder
            return
        assert self.group is not None  # opened before training
        wrapped = _wrap if not sync_batchnorm else _wrap_joint
        with wrapped(encoder, self.group) as network:
            yield network

    def open_training(self, device: torch.device, timeout_s: float) -> "Ranks":
        """Open the group of the training steps: NCCL on a GPU, else gloo.

        Args:
            timeout_s: what a rank waits for the others before it gives up, in a step and between.
        """
        if self.size == 1:
            return self
        timeout = timedelta(seconds=timeout_s)
        host = dist.new_group(backend="gloo", timeout=timeout)
        group = host
        if device.type == "cuda":
            group = dist.new_group(backend="nccl", timeout=timeout)
        # A whole number is torch's sign for a process that is not in the group.
        assert not isinstance(group, int)
        assert not isinstance(host, int)
        return Ranks(self.launch, group, host)

    def _share_of(self, rank: int, count: int) -> slice:
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def close(self) -> None:
        """Part from the others, in order; after an error there is nobody to wait for."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Ranks(Launch(rank=0, size=1, local_rank=0, local_size=1, restarts=0))


def open_ranks(launch: Launch) -> Ranks:
    """Meet the other processes; with one process nothing is opened.

    Small things are exchanged on the host through gloo, whatever device trains.
    """
    if launch.size > 1:
        dist.init_process_group(
            "gloo",
            store=meeting_place(launch, HOST_TIMEOUT),
            rank=launch.rank,
            world_size=launch.size,
            timeout=HOST_TIMEOUT,
        )
    return Ranks(launch)


def lost_rank(error: RuntimeError) -> str | None:
    """What to say of an error of torch that is about another process; None for all others."""
    # gloo raises bare RuntimeErrors that name its source files.
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        first = str(error).splitlines()[0]
        return (
            "another process of this run died or does not answer, see what it said. The last "
            f"checkpoint stays: go on with --resume. (torch: {first})"
        )
    return None


@contextmanager
def _wrap(encoder: nn.Module, group: dist.ProcessGroup) -> Iterator[nn.Module]:
    # Buffers are not copied in each step: they are equal with synchronised normalisation, and
    # without it training never reads them. torch 2.14 renamed the word for it.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    words: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    yield DistributedDataParallel(encoder, process_group=group, **words)


@contextmanager
def _wrap_joint(encoder: nn.Module, group: dist.ProcessGroup) -> Iterator[nn.Module]:
    with joint_batch_norm(encoder, group), _wrap(encoder, group) as network:
        yield network


def _pieces(rows: Tensor, part: slice) -> Iterator[slice]:
    """Cut a range of rows like these into ranges of PIECE_BYTES."""
    row_bytes = rows.element_size() * rows[:1].numel()
    count = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(part.start, part.stop, count):
        yield slice(start, min(start + count, part.stop))


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
