"""A straight transcription of what the authors' released code computes in a step, slow on purpose.

Dense autograd through the (B, N) similarities, sorted top-k on their exponentials, positives as the
concatenation of all walks. Tests compare `mode="official"` with it; benchmarks measure against it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class OfficialStep:
    """The state and the numbers of the released code for one step."""

    bank: Tensor  # (N, D)
    neighbours: Tensor  # (N, K)
    temperature: float
    num_background: int
    steps: int
    num_positives: int
    hard: bool = True
    exclusive: bool = True
    momentum: float = 0.5

    def losses(self, indices: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,), (B, D) -> instance loss, invariance loss, new graph rows (B, K)."""
        k = self.neighbours.shape[1]
        e = torch.exp(outputs @ self.bank.T / self.temperature)  # (B, N), gradient through all
        top, top_ids = torch.topk(e, self.num_background, dim=1, sorted=True)
        own = e.gather(1, indices[:, None])[:, 0]
        total = top.sum(dim=1)
        instance = -torch.log(own / total + 1e-7).mean()

        layer, walks = indices[:, None], []
        for _ in range(self.steps):
            layer = self.neighbours[layer.reshape(-1)].reshape(len(indices), -1)
            walks.append(layer)
        slots = e.gather(1, torch.cat(walks, dim=1))  # repeats and the anchor kept
        positives = torch.topk(
            slots, min(self.num_positives, slots.shape[1]), largest=not self.hard
        )
        rest = total - own if self.exclusive else total
        invariance = -torch.log(positives.values.sum(dim=1) / rest + 1e-7).mean()

        rows = top_ids[:, : k + 1]
        rows = torch.where(rows == indices[:, None], rows[:, k:], rows)
        return instance, invariance, rows[:, :k]

    @torch.no_grad()
    def update(self, indices: Tensor, outputs: Tensor, rows: Tensor) -> None:
        """Move the bank rows towards the outputs and store the new graph rows."""
        mixed = self.momentum * self.bank[indices] + (1 - self.momentum) * outputs
        self.bank[indices] = mixed / mixed.norm(dim=1, keepdim=True)
        self.neighbours[indices] = rows
