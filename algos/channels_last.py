"""Channels-last (NHWC) memory format: the layout of convolutions on tensor cores and in oneDNN."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State


def apply_channels_last(model: nn.Module, *, weights: bool = True) -> nn.Module:
    """Make `model` compute in channels-last: strides of [N, C, H, W] tensors ordered N, H, W, C. Values do not change.

    weights: True converts the four-dimensional parameters and buffers, in place: every parameter stays the same object,
        so optimizers, ties, hooks and requires_grad are unaffected. A convolution then returns channels-last for any
        input. False converts the inputs of convolutions instead of the weights, for weights whose strides are fixed
        (sharding needs them contiguous); a convolution then reorders its small weights on each call.

    Returns the same model. Warns when there is nothing to convert. Applying it again changes nothing.
    """
    if not any(parameter.ndim == 4 for parameter in model.parameters()):
        warnings.warn(
            f"{type(model).__name__} has no four-dimensional parameters; channels-last changes nothing", stacklevel=2
        )
    if weights:
        _convert_weights(model)
    else:
        _convert_inputs(model)
    return model


class ChannelsLast(SpeedUp):
    """Makes the model compute in channels-last, from the start of training.

    It has no settings. Under FSDP, which shards only contiguous parameters, it converts the inputs of convolutions
    instead of their weights.
    """

    contract = Contract(writes=[Resource.MEMORY_FORMAT], after=[Resource.MODEL])
    events = (Event.INIT,)

    def __init__(self) -> None:  # the signature shows that there are no settings
        pass

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Convert the model's weights, or its convolutions' inputs if FSDP is about to shard it."""
        apply_channels_last(state.model, weights=state.fsdp_config is None)


def _convert_weights(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _convert_inputs(model: nn.Module) -> None:
    # At every convolution, not at the model, whose forward may be called without its hooks (Composer evaluates so).
    # From the second convolution on there is usually nothing left to convert.
    for module in model.modules():
        is_convolution = any(parameter.ndim == 4 for parameter in module.parameters(recurse=False))
        if is_convolution and _to_channels_last not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_reorder(value) for value in inputs)


def _reorder(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value
