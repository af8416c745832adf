"""Gradient checkpointing of residual blocks: less memory for activations, at about a third more arithmetic.

Each block's class is replaced in place by a subclass of it. Parameters, their names, hooks, optimizers and checkpoints
are unaffected: the same weights load before and after.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# torchvision's residual blocks and those of the networks here; by name, to avoid importing them.
_BLOCKS = {
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
    "torchvision.models.vision_transformer.EncoderBlock",
    "torchvision.models.swin_transformer.SwinTransformerBlock",
    "torchvision.models.swin_transformer.SwinTransformerBlockV2",
    "torchvision.models.convnext.CNBlock",
    "torchvision.models.efficientnet.MBConv",
    "torchvision.models.efficientnet.FusedMBConv",
    "torchvision.models.regnet.ResBottleneckBlock",
    "torchvision.models.mobilenetv2.InvertedResidual",
    "torchvision.models.mobilenetv3.InvertedResidual",
    "torchvision.models.shufflenetv2.InvertedResidual",
}


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Make every residual block of `model` keep only its input, and recompute the rest in the backward pass.

    In place; returns the same model. Outputs, gradients, dropout masks and batch norm's running statistics do not
    change: the second forward pass repeats the draws and updates no statistics. Applying it again changes nothing.
    torch.compile does not compile blocks with batch norm.

    Raises ValueError when the model has no known block.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    blocks = [module for module in model.modules() if _is_block(module)]
    if not blocks:
        raise ValueError(
            f"gradient_checkpointing is true and {type(model).__name__} has no residual blocks to checkpoint; "
            "set it to false, or make per_device_microbatch_size smaller to save memory"
        )
    for block in blocks:
        if not isinstance(block, _Checkpointed):
            block.__class__ = _checkpointed_class(type(block))
    return model


class _Checkpointed(nn.Module):
    """First base of every changed block's class; the block's former class is the second."""

    _checkpoint: Callable[..., Any]  # torch's
    _checkpoint_with_norms: Callable[..., Any]

    def forward(self, values: Tensor) -> Any:
        if not self.training:
            return super().forward(values)
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            return self._checkpoint_with_norms(super().forward, self, values)
        return self._checkpoint(super().forward, values, use_reentrant=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes created at run time cannot be found by name: rebuild this one from the block's former class. Other
        # libraries' subclasses of it (for sharding) copy themselves.
        first, *others = type(self).__bases__
        if first is not _Checkpointed:
            return super().__reduce_ex__(protocol)
        return _rebuild, tuple(others), self.__dict__.copy()


def _checkpoint_with_norms(forward: Callable[[Tensor], Any], block: _Checkpointed, values: Tensor) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), _running_statistics_at_rest(block)

    return block._checkpoint(forward, values, use_reentrant=False, context_fn=contexts)


def _is_block(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in _BLOCKS for cls in type(module).__mro__)


@contextlib.contextmanager
def _running_statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their running mean and variance, which are dropped.

    Without running statistics a norm would save fewer tensors than the first time, which torch refuses.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


@functools.cache
def _checkpointed_class(cls: type[nn.Module]) -> type[nn.Module]:
    # Imported only for networks that use it: it loads torch's compiler, which takes seconds.
    from torch.utils.checkpoint import checkpoint

    functions = {
        "_checkpoint": staticmethod(checkpoint),
        # Dynamo does not support context_fn, so such a block runs uncompiled.
        "_checkpoint_with_norms": staticmethod(torch.compiler.disable(_checkpoint_with_norms)),
    }
    return type(f"Checkpointed{cls.__name__}", (_Checkpointed, cls), {"__module__": __name__, **functions})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    checkpointed = _checkpointed_class(cls)
    return checkpointed.__new__(checkpointed)
