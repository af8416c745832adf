"""Schedule-free SGD and AdamW (Defazio 2024, arXiv 2405.15682): an average of the weights in place of a decay.

z takes the steps, x is the average of all z and is what one evaluates and keeps, and gradients are taken between the
two, at y = (1 - beta) z + beta x. The network holds y while it trains; z is state, and x follows from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from algos.framework.shards import local_part
from training.optimizers.fused import kernels

Group = dict[str, Any]
CALLBACK = "EvaluateAverages"  # under which a checkpoint has the state of optimizers/switching.py's


class ScheduleFree(torch.optim.Optimizer):
    """Base of both. With g the gradient at y (of AdamW: divided by the root of its second moment) + weight_decay y:

        w <- max(lr so far)^2,  W <- W + w,  c <- w / W
        z <- z - lr g
        x <- (1 - c) x + c z

    `eval` puts x into the network, `train` puts y back, bit for bit; a step needs y. Each element is treated alone, so
    ranks update their own shards.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # As group entries, so that a checkpoint has them.
        super().__init__(params, {**defaults, "steps": 0, "weight_sum": 0.0, "lr_max": 0.0})
        self._before: list[tuple[Tensor, Tensor]] | None = None  # weights and their y, while they hold x

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages x into the network, until `train`. This takes one more copy of the weights."""
        if self._before is not None:
            return
        self._before = []
        for group in self.param_groups:
            for weight in group["params"]:
                if "z" in self.state.get(weight, {}):
                    part = local_part(weight)
                    self._before.append((weight, part.clone()))
                    part.copy_(averaged(part, local_part(self.state[weight]["z"]), _beta(group)))

    @torch.no_grad()
    def train(self) -> None:
        """Put the weights back as they were before `eval`."""
        for weight, before in self._before or ():
            local_part(weight).copy_(before)
        self._before = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient. closure: computes gradients and the loss, which is returned."""
        assert self._before is None, "the network holds the averages; call train() first"
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            share = _next_share(group)
            for weights, directions, steps in self._directions(group):
                self._move(group, weights, directions, steps, share)
        return loss

    def _direction(self, group: Group, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """g of the class's formula without the decay, as new tensors."""
        return [gradient.clone() for gradient in gradients]

    def _directions(self, group: Group) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Parts of weights, what to step along, and z: lists of one kind."""
        for weights in _kinds([weight for weight in group["params"] if weight.grad is not None]):
            for weight in weights:
                if "z" not in self.state[weight]:
                    self.state[weight]["z"] = torch.clone(weight.detach(), memory_format=torch.preserve_format)
            gradients = [local_part(weight.grad) for weight in weights if weight.grad is not None]
            parts = [local_part(weight) for weight in weights]
            directions = self._direction(group, gradients, weights)
            if group["weight_decay"]:
                kernels._foreach_add_(directions, parts, alpha=group["weight_decay"])
            yield parts, directions, [local_part(self.state[weight]["z"]) for weight in weights]

    def _move(
        self, group: Group, weights: list[Tensor], directions: list[Tensor], z: list[Tensor], share: float
    ) -> None:
        """y and z after the step, without x: y <- (1 - c) y + c z + lr (beta (1 - c) - 1) g, then z."""
        lr, beta = float(group["lr"]), _beta(group)
        kernels._foreach_lerp_(weights, z, share)
        kernels._foreach_add_(weights, directions, alpha=lr * (beta * (1 - share) - 1))
        kernels._foreach_add_(z, directions, alpha=-lr)


class ScheduleFreeSGD(ScheduleFree):
    """SGD; `momentum` is beta, in (0, 1)."""

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})


class ScheduleFreeAdamW(ScheduleFree):
    """AdamW; the first of `betas` is beta, in (0, 1), the second that of the second moment."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _direction(self, group: Group, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        beta = group["betas"][1]
        for weight in weights:
            if "exp_avg_sq" not in self.state[weight]:
                self.state[weight]["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        second = [local_part(self.state[weight]["exp_avg_sq"]) for weight in weights]
        kernels._foreach_mul_(second, beta)
        kernels._foreach_addcmul_(second, gradients, gradients, 1 - beta)
        roots = kernels._foreach_div(second, 1 - beta ** group["steps"])
        kernels._foreach_sqrt_(roots)
        kernels._foreach_add_(roots, group["eps"])
        return list(kernels._foreach_div(gradients, roots))


def averaged(weight: Tensor, z: Tensor, beta: float) -> Tensor:
    """x of y = (1 - beta) z + beta x."""
    return torch.lerp(weight, z, 1 - 1 / beta)


def averages_of(weights: Mapping[str, Tensor], z: Mapping[str, Tensor], groups: Iterable[Group]) -> dict[str, Tensor]:
    """x by name, of a checkpoint's weights y, its z, and its parameter groups, whose params are names."""
    betas = {name: _beta(group) for group in groups for name in group["params"]}
    return {name: averaged(weights[name], z[name].to(weights[name]), betas[name]) for name in z}


def is_schedule_free(groups: Iterable[Group]) -> bool:
    """Whether a checkpoint's parameter groups are of a schedule-free optimizer."""
    return all("weight_sum" in group for group in groups)


def statistics_at_averages(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Batch norm's statistics at x by the model's names, of a checkpoint's "state"; empty if it was not evaluated."""
    callbacks: Any = state.get("callbacks") or {}
    named = dict(callbacks.items() if isinstance(callbacks, Mapping) else callbacks)
    return dict(named.get(CALLBACK, {}).get("statistics", {}))


def _beta(group: Group) -> float:
    return group["betas"][0] if "betas" in group else group["momentum"]


def _next_share(group: Group) -> float:
    """c of this step; before the first step with a learning rate above 0 nothing is averaged."""
    group["steps"] += 1
    group["lr_max"] = max(float(group["lr"]), group["lr_max"])
    weight = group["lr_max"] ** 2
    group["weight_sum"] += weight
    return weight / group["weight_sum"] if group["weight_sum"] else 0.0


def _kinds(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists to update at once: of one device and type on a GPU; elsewhere of one weight, which then stays in cache."""
    kinds: dict[Any, list[Tensor]] = {}
    for index, weight in enumerate(weights):
        kinds.setdefault((weight.device, weight.dtype) if weight.device.type == "cuda" else index, []).append(weight)
    yield from kinds.values()
