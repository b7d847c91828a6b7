"""How torchrun started this process: who it is, where the others meet, what they can share.

In: the environment. Out: a `Launch`, the store in which the processes of this attempt find each
other, the device of each; or an error that names numbers that would do.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

LOOKS_AGAIN_S = 0.05  # for rank 0, at the start


class RankError(Exception):
    """Processes that cannot be one run; the message says what to change."""


class Launch(NamedTuple):
    """This process among those of the run, as torchrun started it."""

    rank: int  # 0..size - 1
    size: int
    local_rank: int  # on this host
    local_size: int
    restarts: int  # how often torchrun began anew


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read what torchrun says in the environment; without torchrun it is one process.

    Raises:
        RankError: it says only half of it.
    """
    size = environment.get("WORLD_SIZE", "1")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if size == "1":
        return Launch(0, 1, int(environment.get("LOCAL_RANK", "0")), 1, restarts)
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise RankError(
            f"WORLD_SIZE={size} says that this is one of {size} processes, but {', '.join(missing)}"
            " is not set: start them with torchrun, or unset WORLD_SIZE"
        )
    rank, count, local_rank, local_size = (int(environment[name]) for name in names)
    return Launch(rank, count, local_rank, local_size, restarts)


def rank_device(asked: str, launch: Launch) -> torch.device:
    """The device of this process; with several on a host each has a GPU of its own.

    Args:
        asked: cpu or cuda.

    Raises:
        RankError: fewer GPUs on this host than processes.
    """
    if asked != "cuda" or launch.size == 1:
        return torch.device(asked)
    there = torch.cuda.device_count()
    if launch.local_size > there:
        raise RankError(
            f"{launch.local_size} processes on this host, but it has {there} GPUs: start "
            f"torchrun with --nproc-per-node={there}, or give device=cpu"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def check_divides(batch_size: int, size: int, *, sync_batchnorm: bool) -> None:
    """Make sure that a batch can be shared equally.

    Raises:
        RankError: it cannot, naming numbers that would do.
    """
    if batch_size % size:
        sizes = [n for n in range(1, min(batch_size, 2 * size) + 1) if batch_size % n == 0]
        below = batch_size // size * size
        batches = [str(batch) for batch in (below, below + size) if batch >= 2]
        raise RankError(
            f"batch_size={batch_size} cannot be shared equally by {size} processes: start "
            f"{_either(list(map(str, sizes)))} of them, or give batch_size={' or '.join(batches)}"
        )
    if batch_size == size > 1 and not sync_batchnorm:
        raise RankError(
            f"batch_size={batch_size} leaves one image to each of {size} processes, which batch "
            "normalisation cannot work with: give distributed.sync_batchnorm=true, or "
            f"batch_size={2 * size}"
        )


def meeting_place(launch: Launch, timeout: timedelta) -> Store:
    """A part of torchrun's store in which nothing stands from an attempt before this one.

    torchrun keeps one store over all restarts (torch 2.14), with the addresses of killed processes
    in it, and hosts need not agree on the number of restarts. So rank 0 opens a numbered part and
    waits for a token of each other rank there; a rank that does not find its token among those met
    has come to the part of an earlier attempt and looks again.
    """
    store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=timeout))
    if launch.rank == 0:
        part = str(store.add("parts", 1))
        store.set("newest part", part)
        tokens = [store.get(f"{part}/token/{rank}").decode() for rank in range(1, launch.size)]
        store.set(f"{part}/met", " ".join(tokens))
        return PrefixStore(part, store)
    token = uuid.uuid4().hex
    gives_up = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < gives_up:
        part = store.get("newest part").decode()
        store.set(f"{part}/token/{launch.rank}", token)
        met = f"{part}/met"
        if store.check([met]) and token in store.get(met).decode():
            return PrefixStore(part, store)
        time.sleep(LOOKS_AGAIN_S)
    raise RankError(f"rank 0 did not come within {timeout}: see what it said")


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
