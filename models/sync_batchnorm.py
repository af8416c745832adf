"""Batch norm over the images of every rank, on any backend.

torch's own SyncBatchNorm runs on GPUs only. On CPU ranks this one replaces it, so that a run on several ranks computes
what a single process computes at the same global batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn


class CrossRankBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are over the images [N, C, H, W] of all ranks.

    mean = sum x / n, var = sum (x - mean)^2 / n with both sums over ranks (float64), gradients included.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(input)
        count, mean, var = _moments_over_ranks(input)
        if self.track_running_stats:
            self._track(count, mean.detach(), var.detach())
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        per_channel = (1, -1, 1, 1)
        return input * scale.to(input.dtype).view(per_channel) + shift.to(input.dtype).view(per_channel)

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.item()
        for running, value in ((self.running_mean, mean), (self.running_var, var * count / (count - 1).clamp(min=1))):
            assert running is not None
            running.lerp_(value.to(running.dtype), momentum)


def synchronize_batchnorm(model: nn.Module, *, device_type: str) -> nn.Module:
    """Synchronize every 2-d batch norm of `model`, keeping parameters, buffers and their names."""
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CrossRankBatchNorm2d
    return model


def _moments_over_ranks(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = images.double()
    count = wide.new_full((1,), wide.numel() / wide.shape[1])
    sums = _sum_over_ranks(torch.cat([wide.sum((0, 2, 3)), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centered = wide - mean.view(1, -1, 1, 1)
    var = _sum_over_ranks(centered.square().sum((0, 2, 3))) / total
    return total, mean, var


# A custom operator, so that torch.compile sees one graph: if it breaks at a collective, an in-place activation after
# the batch norm changes what the convolution in the next graph has saved, and backward fails.
@torch.library.custom_op("brisk::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks; the gradient is summed as well."""
    summed = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed


@_sum_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _sum_of_gradients(context: object, gradient: Tensor) -> Tensor:
    return _sum_over_ranks(gradient)


_sum_over_ranks.register_autograd(_sum_of_gradients)
