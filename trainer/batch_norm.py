"""Batch normalisation over the batch of all ranks together, for encoders trained by several.

In: an encoder with torch's own layers. Out: the same encoder, whose layers take their statistics
from the joined batch while a context lasts; parameters and running statistics are the very same
tensors, so a state dict never shows it and afterwards the plain layers stand there again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class JointBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of the joined batch; every rank has an equal share.

    torch's SyncBatchNorm refuses tensors on the CPU. This one is exact on every device: means and
    variances are joined by their own formula, not by sums of squares, which cancel.
    """

    def __init__(self, plain: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(
            plain.num_features,
            eps=plain.eps,
            momentum=plain.momentum,
            affine=plain.affine,
            track_running_stats=plain.track_running_stats,
            device="meta",  # every tensor is replaced by that of `plain`
        )
        self.group = group
        self._parameters = dict(plain._parameters)
        self._buffers = dict(plain._buffers)
        self.train(plain.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"wanted (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same, as torch's layers do; one exchange of (2, C) numbers."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        others = [0, *range(2, input.ndim)]
        values = input.float()  # statistics of reduced precision would be rounded
        own_variance, own_mean = torch.var_mean(values, others, correction=0)  # (C,) each
        joined: Tensor = _JoinedOverRanks.apply(torch.stack([own_mean, own_variance]), self.group)
        means, variances = joined.unbind(1)  # (R, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        self._remember(mean, variance, count=len(means) * (input.numel() // input.shape[1]))
        shape = [1, -1, *[1] * (input.ndim - 2)]
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        output = (values - mean.view(shape)) * scale.view(shape)
        if self.affine:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        """Move the running statistics, the variance without bias, as torch does."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # torch's word for a plain mean over all batches
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


@contextmanager
def joint_batch_norm(network: nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """While entered, the batch normalisation layers below `network` look at the joined batch.

    On GPUs these are torch's SyncBatchNorm, whose kernels are fused; elsewhere `JointBatchNorm`.
    """
    replaced = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    for parent, name, plain in replaced:
        on_gpu = next(network.parameters()).is_cuda
        joint: nn.Module = (
            nn.SyncBatchNorm.convert_sync_batchnorm(plain, group)  # type: ignore[no-untyped-call]
            if on_gpu
            else JointBatchNorm(plain, group)
        )
        setattr(parent, name, joint)
    try:
        yield
    finally:
        for parent, name, plain in replaced:
            plain.train(getattr(parent, name).training)
            setattr(parent, name, plain)


class _JoinedOverRanks(torch.autograd.Function):
    """(...) on each of R ranks -> (R, ...) on all; what flows back is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Join in the order of the ranks."""
        ctx.group = group
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Each rank's loss depends on every rank's values."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None
