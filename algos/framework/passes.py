"""Forward passes beside the training step's own: of the model as it evaluates, and of other networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode and records no gradients; every module's mode is then as it was before.

    So nothing random is drawn, and no norm's running statistics move.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def without_ddp(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps; any other model is returned itself.

    For passes without gradients: DDP's own would broadcast buffers, which may differ in what else the ranks do.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
