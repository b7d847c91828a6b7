"""The two losses of Invariance Propagation, as pure functions of similarities.

In: cosine similarities of each anchor to its own bank row, to positives and to background rows.
Out: the batch mean. No bank, no rank, no device, no state. Wang et al., NeurIPS 2020, section 3.
Letters: B anchors, P positives, M background rows.
"""

import torch
from torch import Tensor, nn

# The released code adds this inside its logarithms; it caps the loss at 16.1.
OFFICIAL_EPSILON = 1e-7


def instance_loss(own: Tensor, background: Tensor, temperature: float) -> Tensor:
    """Mean of -log P(i | background and i): tell each image from the hardest others.

    Args:
        own: (B,) similarity of each anchor to its own bank row.
        background: (B, M) similarities to the rows it competes with, its own not among them; -inf
            takes an entry out of the set.
        temperature: tau > 0.

    Returns:
        () loss >= 0; ln(M + 1) when all similarities are equal.
    """
    logits = torch.cat([own[:, None], background], dim=1) / temperature
    anchor = torch.zeros(len(own), dtype=torch.int64, device=own.device)  # its column
    return nn.functional.cross_entropy(logits, anchor)


def invariance_loss(
    positives: Tensor, mask: Tensor, background: Tensor, temperature: float
) -> Tensor:
    """Mean of -log P(positives | positives and background): pull propagated positives in.

    Args:
        positives: (B, P) similarities to the chosen positives.
        mask: (B, P) bool, False where there is no positive.
        background: (B, M') similarities to negatives only, no positive and not the anchor; -inf
            takes an entry out of the set.
        temperature: tau > 0.

    Returns:
        () loss >= 0. An anchor without positives, or without negatives, adds 0 and no gradient.
    """
    anchored = mask.any(dim=1)  # (B,)
    # A row without positives is computed as if all were there and then left out: finite gradients.
    wanted = positives.masked_fill(~mask & anchored[:, None], -torch.inf)
    logits = torch.cat([wanted, background], dim=1) / temperature
    likelihood = nn.functional.log_softmax(logits, dim=1)[:, : mask.shape[1]].logsumexp(dim=1)
    return torch.where(anchored, -likelihood, 0.0).mean()


def official_instance_loss(own: Tensor, top: Tensor, temperature: float) -> Tensor:
    """The released code's lossA: mean of -log(e_own / sum(e_top) + 1e-7).

    Args:
        own: (B,) similarity of each anchor to its own bank row.
        top: (B, M) the M largest similarities over the whole bank, whatever they belong to.
    """
    total = torch.exp(top / temperature).sum(dim=1)
    return -torch.log(torch.exp(own / temperature) / total + OFFICIAL_EPSILON).mean()


def official_invariance_loss(
    own: Tensor,
    positives: Tensor,
    mask: Tensor,
    top: Tensor,
    temperature: float,
    *,
    exclusive: bool,
) -> Tensor:
    """The released code's lossB: mean of -log(sum(e_positives) / (sum(e_top) - e_own) + 1e-7).

    The positives need not be in `top`, so this is no probability and may be negative.

    Args:
        own, top: as in `official_instance_loss`.
        positives: (B, P) similarities to the chosen walk ends, repeats and the anchor kept.
        mask: (B, P) bool, False where there is none.
        exclusive: subtract e_own, whether or not it is in `top`.
    """
    wanted = torch.where(mask, torch.exp(positives / temperature), 0.0).sum(dim=1)
    total = torch.exp(top / temperature).sum(dim=1)
    if exclusive:
        total = total - torch.exp(own / temperature)
    return -torch.log(wanted / total + OFFICIAL_EPSILON).mean()
