"""Optimizers by name, and which parameters weight decay spares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def sgd(
    parameters: list[dict[str, Any]],
    *,
    learning_rate: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_norms_and_biases: bool = False,
) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay is added to the gradient (coupled to the learning rate)."""
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, nesterov=nesterov)


def adamw(
    parameters: list[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_norms_and_biases: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2019, arXiv 1711.05101); weight decay shrinks the weights by learning_rate x weight_decay."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=eps)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "sgd": sgd}


def build_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that `settings` (a name and its arguments) describes, over `model`'s parameters in two groups."""
    arguments = {key: value for key, value in settings.items() if key != "name"}
    groups = parameter_groups(
        model,
        weight_decay=arguments["weight_decay"],
        decay_norms_and_biases=arguments["decay_norms_and_biases"],
    )
    return OPTIMIZERS[settings["name"]](groups, **arguments)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_norms_and_biases: bool = False
) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those of norm layers and every bias without.

    Norm layers are known by their type, not by name, so a norm in a shortcut called "downsample.1" is one of them.
    """
    exempt: set[int] = set()
    if not decay_norms_and_biases:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, _NORMS) or name == "bias":
                    exempt.add(id(parameter))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
