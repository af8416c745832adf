"""Composer's two optimizers with decoupled weight decay, by torch's kernels for all weights of a kind.

Composer's own go through the weights one by one, and on a GPU its DecoupledAdamW waits for the device at each of them.
Names, settings and state are Composer's, so a checkpoint of either continues the other.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from composer import optim
from torch import Tensor

from training.optimizers.fused import (
    FusedAdamW,
    FusedSGD,
    Group,
    Updated,
    kernels,
    scaling,
    update_by_adamw,
    update_by_sgd,
)

# On a CPU, Composer's four operations take less time than the kernel for a weight of more elements (2 MiB of L2 cache).
_LARGE = 2**15


class DecoupledSGDW(FusedSGD, optim.DecoupledSGDW):
    """composer.optim.DecoupledSGDW."""

    otherwise = optim.DecoupledSGDW

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        _keep_first_rates(self)

    def _fuse(self, group: Group) -> list[Updated] | None:
        if not group["momentum"]:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.state[weight]["momentum_buffer"] = None  # as Composer's
        return super()._fuse(group)

    def _update(self, group: Group, kind: Updated) -> None:
        scaled = scaling(self, kind)
        if kind.weights[0].device.type == "cpu" and not (group["nesterov"] or scaled):
            large = [weight.numel() > _LARGE for weight in kind.weights]
            self._update_one_by_one(group, _chosen(kind, large))
            kind = _chosen(kind, [not one for one in large])
        if not kind.weights:
            return
        if group["weight_decay"]:
            shrink = group["weight_decay"] * (group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0)
            kernels._foreach_mul_(kind.weights, _unless_skipped(1 - shrink, scaled.get("found_inf"), kind))
        update_by_sgd(self, group, kind, weight_decay=0.0)

    def _update_one_by_one(self, group: Group, kind: Updated) -> None:
        keys = ("weight_decay", "momentum", "lr", "initial_lr", "dampening", "nesterov")
        momenta: Any = kind.states[0] if kind.states else []
        self.sgdw(kind.weights, kind.gradients, momenta, **{key: group[key] for key in keys})


class DecoupledAdamW(FusedAdamW, optim.DecoupledAdamW):
    """composer.optim.DecoupledAdamW."""

    otherwise = optim.DecoupledAdamW

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        _keep_first_rates(self)

    def _fuse(self, group: Group) -> list[Updated] | None:
        # The kernel multiplies the decay by the rate, Composer by the rate's share of the first one.
        return super()._fuse(group) if group["initial_lr"] or not group["weight_decay"] else None

    def _update(self, group: Group, kind: Updated) -> None:
        decay = group["weight_decay"]
        update_by_adamw(self, group, kind, weight_decay=decay / group["initial_lr"] if decay else 0.0)


def _keep_first_rates(optimizer: torch.optim.Optimizer) -> None:
    """As numbers: a rate that is a tensor is changed in place, and reading it would wait for its device."""
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["initial_lr"])


def _chosen(kind: Updated, which: list[bool]) -> Updated:
    weights, gradients, *states = (
        list(itertools.compress(tensors, which)) for tensors in (kind.weights, kind.gradients, *kind.states)
    )
    return Updated(weights, gradients, states, kind.steps)


def _unless_skipped(factor: float | Tensor, found_inf: Tensor | None, kind: Updated) -> float | Tensor:
    """`factor`, or 1 if a gradient scaler has the kernel skip the step."""
    if isinstance(factor, Tensor):
        factor = factor.to(kind.weights[0].device, non_blocking=True)
    return factor if found_inf is None else torch.where(found_inf > 0, 1.0, factor)
