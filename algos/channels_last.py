"""Channels-last (NHWC) memory format: the layout that convolutions on tensor cores and oneDNN work in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from algos.base import Contract, Event, Logger, Resource, SpeedUp, State


def apply_channels_last(model: nn.Module, *, weights: bool = True) -> nn.Module:
    """Make `model` compute in channels-last: strides of [N, C, H, W] tensors ordered N, H, W, C. Values do not change.

    weights: True converts the four-dimensional parameters and buffers, in place: every parameter stays the same object,
        so optimizers, ties, hooks and requires_grad stay as they are. A convolution then returns channels-last whatever
        it is given. False leaves the weights and converts the four-dimensional inputs of every forward pass instead,
        for weights whose strides are fixed (sharding needs them contiguous); a convolution then reorders its small
        weights on each call.

    Returns the same model. Warns when there is nothing to convert. Applying it twice is applying it once.
    """
    if not weights:
        return _convert_inputs(model)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4]
    if not tensors:
        warnings.warn(
            f"{type(model).__name__} has no four-dimensional parameters; channels-last changes nothing", stacklevel=2
        )
    with torch.no_grad():
        for tensor in tensors:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


class ChannelsLast(SpeedUp):
    """Makes the model compute in channels-last, from the start of training.

    Under FSDP, which shards contiguous parameters only, the images are converted instead of the weights.
    """

    contract = Contract(writes=[Resource.MEMORY_FORMAT], after=[Resource.MODEL])
    events = (Event.INIT,)

    def __init__(self) -> None:
        pass

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Convert the model's weights, or its inputs if FSDP is about to shard it."""
        apply_channels_last(state.model, weights=state.fsdp_config is None)


def _convert_inputs(model: nn.Module) -> nn.Module:
    if _to_channels_last not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_to_channels_last, with_kwargs=True)
    return model


def _to_channels_last(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tree_map_only(Tensor, _reorder, (args, kwargs))


def _reorder(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
