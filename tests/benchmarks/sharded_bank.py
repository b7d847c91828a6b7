"""One rank's part of a step against a bank divided among 8, against a step with a whole bank.

    python tests/benchmarks/sharded_bank.py             # N = 160,000, B = 2048, R = 8, M = 4096
    python tests/benchmarks/sharded_bank.py --clustered-by-rank     # neighbours lie on one rank

The eight ranks run once as threads, and what each was told is kept; then the part of rank 0 is
timed alone, with those answers. Beside it a step of B / R embeddings against all N rows: as many
products. Seconds of the one thread on its core, interleaved, medians. Also: bytes that travel,
counted; the peak of memory; how far losses and gradients of two real processes (gloo) are off.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.loss_memory import forget_peak, resident_bytes
from tests.reference.threads import Threads, together
from trainer.distributed import open_ranks
from trainer.launch import Launch
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective
from trainer.sharded_bank import BankShard
from trainer.sharded_objective import Exchange, sharded_objective

WEIGHT, DIM, K = 0.6, 128, 4
CENTRES = 1000


class Answers(Threads):
    """A rank among threads that keeps what it was told."""

    told: list[list[Tensor]]

    def _count(self, kind: str, tensors: list[Tensor]) -> list[Tensor]:
        self.told.append([each.clone() for each in tensors])
        return super()._count(kind, tensors)


class Replay:
    """A rank whose others have answered already."""

    def __init__(self, answers: Answers) -> None:
        self.rank, self.size, self.told = answers.rank, answers.size, answers.told
        self.next = 0

    def _answer(self) -> list[Tensor]:
        self.next += 1
        return self.told[(self.next - 1) % len(self.told)]

    def joined(self, *parts: Tensor) -> list[Tensor]:
        return self._answer()

    def summed(self, own: Tensor) -> Tensor:
        return self._answer()[0]

    def share_of_sum(self, own: Tensor) -> Tensor:
        return self._answer()[0].chunk(self.size)[self.rank]


def clustered(num_images: int, generator: torch.Generator, *, in_order: bool) -> Tensor:
    """Unit rows around 1,000 centres, spread over all ids or one centre after the other."""
    centres = torch.randn(CENTRES, DIM, generator=generator)
    member = torch.randint(0, CENTRES, (num_images,), generator=generator)
    if in_order:
        member = member.sort().values
    noise = torch.randn(num_images, DIM, generator=generator)
    return torch.nn.functional.normalize(centres[member] + noise, dim=1)


def filled(bank: MemoryBank, rows: Tensor, graph: Tensor) -> None:
    bank.embeddings.copy_(rows[bank.held.start : bank.held.stop])
    bank.neighbours.copy_(graph)


def shard(rows: Tensor, graph: Tensor, rank: int, size: int) -> BankShard:
    count = len(rows)
    held = range(count * rank // size, count * (rank + 1) // size)
    bank = BankShard(count, DIM, K, held=held)
    filled(bank, rows, graph)
    return bank


def step(
    bank: BankShard, indices: Tensor, fresh: Tensor, config: LossConfig, ranks: Exchange
) -> tuple[Tensor, Tensor]:
    """Both losses, and the gradient of a rank's share; bank and graph are written."""
    share = fresh.chunk(ranks.size)[ranks.rank].clone().requires_grad_()
    found, joined = sharded_objective(bank, indices, share, config, ranks)
    (found.instance + WEIGHT * found.invariance).backward()
    bank.update(indices, joined)
    bank.refresh_neighbours(indices, found.nearest)
    assert share.grad is not None
    losses = torch.stack([found.instance.detach(), found.invariance.detach()])
    return losses, share.grad / ranks.size


def whole_step(
    bank: MemoryBank, indices: Tensor, fresh: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """The same with a whole bank."""
    own = fresh.clone().requires_grad_()
    found = objective(bank, indices, own, config)
    (found.instance + WEIGHT * found.invariance).backward()
    bank.update(indices, own.detach())
    bank.refresh_neighbours(indices, found.nearest)
    assert own.grad is not None
    return torch.stack([found.instance.detach(), found.invariance.detach()]), own.grad


def of_two_processes(rank: int, port: int, given: dict[str, Any], answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = open_ranks(Launch(rank, 2, rank, 2, restarts=0))
    ranks = ranks.open_training(torch.device("cpu"), 600)
    bank = shard(given["rows"], given["graph"], rank, 2)
    losses, gradient = step(bank, given["indices"], given["fresh"], given["config"], ranks)
    answers.put((rank, losses.numpy(), gradient.numpy(), bank.neighbours.numpy()))
    ranks.close()


def exactness(given: dict[str, Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    started = [
        spawn.Process(target=of_two_processes, args=(rank, port, given, answers))
        for rank in range(2)
    ]
    for each in started:
        each.start()
    found = sorted((answers.get(timeout=300) for _ in started), key=lambda answer: answer[0])
    for each in started:
        each.join()
    bank = MemoryBank(len(given["rows"]), DIM, K)
    filled(bank, given["rows"], given["graph"])
    losses, gradient = whole_step(bank, given["indices"], given["fresh"], given["config"])
    two = torch.cat([torch.from_numpy(answer[2]) for answer in found])
    off = float((two - gradient).norm() / gradient.norm())
    far = float((torch.from_numpy(found[0][1]) - losses).abs().max())
    same = (torch.from_numpy(found[0][3]) == bank.neighbours).all()
    print(f"two processes, gloo, N = {len(bank.neighbours):,}, B = {len(given['indices'])}")
    print(f"  losses, absolute difference    {far:.2e}")
    print(f"  gradient, relative difference  {off:.2e}")
    print(f"  graph rows equal               {bool(same)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=160_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--background", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clustered-by-rank", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    size, own = options.ranks, options.batch // options.ranks

    rows = clustered(options.images, generator, in_order=options.clustered_by_rank)
    graph = torch.randint(0, options.images, (options.images, K), generator=generator)
    indices = torch.randperm(options.images, generator=generator)[: options.batch]
    fresh = rows[indices] + 0.05 * torch.randn(options.batch, DIM, generator=generator)
    fresh = torch.nn.functional.normalize(fresh, dim=1)
    config = LossConfig(
        temperature=0.07, num_background=options.background, steps=3, num_positives=50
    )
    exactness(
        {
            "rows": rows[::8].clone(),
            "graph": graph[::8] // 8,
            "indices": torch.arange(0, 256) * 7,
            "fresh": fresh[:256].clone(),
            "config": config,
        }
    )

    def listen(ranks: Threads) -> tuple[Answers, Tensor, Tensor]:
        torch.set_num_threads(1)
        answers = Answers(ranks.meeting, ranks.rank)
        answers.told = []
        losses, gradient = step(
            shard(rows, graph, ranks.rank, size), indices, fresh, config, answers
        )
        return answers, losses, gradient

    everybody = together(size, listen)
    first = everybody[0][0]
    whole = MemoryBank(options.images, DIM, K)
    filled(whole, rows, graph)
    losses, gradient = whole_step(whole, indices, fresh, config)
    joined = torch.cat([each for _, _, each in everybody])
    print(f"N = {options.images:,}, B = {options.batch}, R = {size}, M = {options.background}")
    print(f"  losses, absolute difference    {float((everybody[0][1] - losses).abs().max()):.2e}")
    off = float((joined - gradient).norm() / gradient.norm())
    print(f"  gradient, relative difference  {off:.2e}")
    payload, calls = first.payload, first.calls
    around = (size - 1) / size
    sent = around * (payload["joined"] + 2 * payload["summed"] + payload["share of sum"])
    print(f"bytes of a step, as all hold them  {sum(payload.values()):,} in {sum(calls.values())}")
    print(f"  {', '.join(f'{kind} {count:,}' for kind, count in payload.items())}")
    print(f"bytes a rank sends around a ring   {sent:,.0f}")
    del everybody, joined

    mine = shard(rows, graph, 0, size)
    replay = Replay(first)
    scores = torch.empty(own, options.images)
    part = slice(0, own)

    def matmul() -> None:
        torch.mm(fresh[part], rows.T, out=scores)

    variants: dict[str, Callable[[], object]] = {
        "one rank of the divided bank": lambda: step(mine, indices, fresh, config, replay),
        "B / R against the whole bank": lambda: whole_step(
            whole, indices[part], fresh[part], config
        ),
        "B against the whole bank": lambda: whole_step(whole, indices, fresh, config),
        "bare matmul of B / R x N": matmul,
    }
    filled(mine, rows, graph)
    forget_peak()
    before = resident_bytes("VmRSS")
    variants["one rank of the divided bank"]()
    extra = resident_bytes("VmHWM") - before
    candidates = options.batch * min(options.background, len(mine.held))
    print(
        f"one rank of the divided bank, at its peak {extra / 1e6:.0f} MB: "
        f"{extra / candidates:.0f} bytes for each of {candidates:,} candidates"
    )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, run in variants.items():
            filled(mine, rows, graph)
            filled(whole, rows, graph)
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians["B / R against the whole bank"]
    for name, median in medians.items():
        print(f"{name:<30} {median * 1e3:8.1f} ms   {median / reference:5.2f}x")


if __name__ == "__main__":
    main()
