"""Whether a memory bank fits: what it takes on each process, and what the machine has left.

In: the recipe's sizes and N, known once the images were read, and the free memory of GPU and host.
Out: nothing, or an error with the figures and what to set; before anything of that size is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.request import UnavailableError
from trainer.search import BLOCK_BYTES

NUMBER, ID = 4, 8  # bytes of a float32 and of an int64
# Bytes that a step takes at its peak for each candidate of each embedding: ids, similarities,
# masks, weights (tests/benchmarks/sharded_bank.py measures them).
CANDIDATE_BYTES = 64
WALK_BYTES = (
    128  # the same for each end of a walk along the graph, beside the row it is compared with
)


@dataclass(frozen=True)
class BankSizes:
    """What decides how much memory a bank and a step against it take."""

    num_images: int  # N
    dim: int  # D
    num_neighbours: int  # K
    steps: int  # l
    num_background: int  # M
    batch_size: int  # B, of all processes together


class BankMemory(NamedTuple):
    """Bytes of one process."""

    rows: int
    graph: int
    step: int  # the block of similarities, candidates and positives of one step
    saving: int  # on the host of rank 0, while a checkpoint is written

    @property
    def training(self) -> int:
        """All but saving."""
        return self.rows + self.graph + self.step


class Free(NamedTuple):
    """Bytes that can be had; None where it is not known."""

    host: int | None
    gpu: int | None  # of the GPU that trains; None also on a CPU


def bank_memory(sizes: BankSizes, processes: int, *, sharded: bool) -> BankMemory:
    """What a bank takes on each of `processes`, the largest where they differ."""
    sharded = sharded and processes > 1
    images, k = sizes.num_images, sizes.num_neighbours
    held = -(-images // processes) if sharded else images
    queries = sizes.batch_size if sharded else -(-sizes.batch_size // processes)
    block = max(min(BLOCK_BYTES, queries * held * NUMBER), queries * NUMBER)
    candidates = queries * min(sizes.num_background, held) * CANDIDATE_BYTES
    walks = sum(k**hop for hop in range(1, sizes.steps + 1))
    positives = queries * walks * (sizes.dim * NUMBER + WALK_BYTES)
    whole = images * sizes.dim * NUMBER
    graph = images * k * ID
    return BankMemory(
        rows=held * sizes.dim * NUMBER,
        graph=graph,
        step=block + candidates + positives,
        # A copy on the host, while training goes on; of a divided bank besides what was gathered.
        saving=whole * (2 if sharded else 1) + graph,
    )


def check_bank_fits(recipe: Recipe, num_images: int, device: torch.device, ranks: Ranks) -> None:
    """Compare what the recipe's bank takes with what is free; all ranks call this.

    Raises:
        UnavailableError: on rank 0, where it does not fit. FirstRankFailed: on the others.
    """
    sizes = BankSizes(
        num_images=num_images,
        dim=recipe.encoder.dim,
        num_neighbours=recipe.bank.num_neighbours,
        steps=recipe.loss.steps,
        num_background=recipe.loss.num_background,
        batch_size=recipe.batch_size,
    )
    everywhere = ranks.gathered((free_bytes(device), ranks.launch.local_size))
    least = Free(
        *(_least(values) for values in zip(*(free for free, _ in everywhere), strict=True))
    )
    per_host = max(count for _, count in everywhere)
    ranks.from_first(
        lambda: check_fits(
            sizes, least, processes=ranks.size, per_host=per_host, sharded=recipe.bank.sharded
        )
    )


def check_fits(
    sizes: BankSizes, free: Free, *, processes: int, per_host: int, sharded: bool
) -> None:
    """Make sure that bank and step fit.

    Args:
        free: the least that any process finds.
        per_host: the most processes on one host, which share its memory.

    Raises:
        UnavailableError: they do not, with what is needed, what there is and what to set.
    """
    needs = bank_memory(sizes, processes, sharded=sharded)
    if free.gpu is not None and needs.training > free.gpu:
        where, there, taken = "the GPU", free.gpu, f"{_gb(needs.training)} on each GPU"
    elif free.host is not None and _on_host(needs, free, per_host) > free.host:
        where, there = "this host", free.host
        taken = f"{_gb(_on_host(needs, free, per_host))} on a host"
        if free.gpu is None:
            taken += f" of {per_host} process{'es' if per_host > 1 else ''}"
    else:
        return
    shown = f"{_gb(needs.rows)} rows, {_gb(needs.graph)} graph, {_gb(needs.step)} for a step"
    raise UnavailableError(
        f"a memory bank of {sizes.num_images:,} images x encoder.dim={sizes.dim} takes {taken} "
        f"({shown} in each process, {_gb(needs.saving)} while it is saved), but {where} has "
        f"{_gb(there)} free: {', or '.join(_remedies(sizes, free, processes, per_host))}"
    )


def free_bytes(device: torch.device) -> Free:
    """What this process could still have."""
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Free(host_free_bytes(), gpu)


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process could still have on the host: of the kernel's word and its groups'.

    Args:
        root: where proc and sys are found.

    Returns:
        None where there is no /proc/meminfo (not Linux).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    known = dict(line.split(":", 1) for line in lines)
    free = int(known["MemAvailable"].split()[0]) * 1024
    return min([free, *_group_free_bytes(root)])


def _group_free_bytes(root: Path) -> Iterator[int]:
    """What is left of each limit of the control groups this process is in, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        # A container may show its own group as the root of all.
        for folder in (group, *group.parents):
            if (folder / limit).is_file():
                allowed = (folder / limit).read_text().strip()
                if allowed != "max":
                    taken = int((folder / used).read_text()) - _cached(folder, cache)
                    yield max(0, int(allowed) - taken)
            if folder == top:
                break


def _cached(folder: Path, name: str) -> int:
    """Bytes of files that the kernel would drop before it refuses memory."""
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    return 0


def _on_host(needs: BankMemory, free: Free, per_host: int) -> int:
    """Bytes on the host of rank 0, which its processes share, and train on without a GPU."""
    return needs.saving + (per_host * needs.training if free.gpu is None else 0)


def _fits(sizes: BankSizes, free: Free, *, processes: int, per_host: int, sharded: bool) -> bool:
    needs = bank_memory(sizes, processes, sharded=sharded)
    on_gpu = free.gpu is None or needs.training <= free.gpu
    return on_gpu and (free.host is None or _on_host(needs, free, per_host) <= free.host)


def _remedies(sizes: BankSizes, free: Free, processes: int, per_host: int) -> list[str]:
    """What to do instead, where it is known to help."""
    remedies = []
    counts = [n for n in range(2, sizes.batch_size + 1) if sizes.batch_size % n == 0]
    for count in counts:
        if _fits(sizes, free, processes=count, per_host=1, sharded=True):
            each = _gb(bank_memory(sizes, count, sharded=True).training)
            where = "GPUs like this" if free.gpu is not None else "hosts like this, one on each"
            remedies.append(
                f"give bank.sharded=true and start torchrun with {count} processes on {where} "
                f"({each} in each)"
            )
            break
    dim = sizes.dim // 2
    while dim >= 2:
        smaller = replace(sizes, dim=dim)
        if _fits(smaller, free, processes=processes, per_host=per_host, sharded=False):
            remedies.append(f"give encoder.dim={dim}")
            break
        dim //= 2
    return [*remedies, "train on fewer images"]


def _least(values: tuple[int | None, ...]) -> int | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)


def _gb(count: int) -> str:
    """Three digits: 10.3 GB, 454 MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
