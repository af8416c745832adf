"""FixRes under DeepSpeed: a step that leaves frozen parameters and their optimizer state alone, bit for bit.

Optimizers skip parameters without a gradient. ZeRO flattens each parameter group into one tensor, in which a frozen
parameter has a gradient of zeros, so that momentum and weight decay would go on moving it. So what the phase freezes
is put into groups of its own before ZeRO flattens them, and these are skipped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from algos.fixres import Trained, briefly_frozen

_FREEZES = "frozen_by_fixres"  # a parameter group's key, which checkpoints keep


def put_frozen_apart(optimizer: Optimizer, model: nn.Module, *, train: Trained) -> None:
    """Split each group of `optimizer` into what FixRes freezes in its phase, to be skipped then, and what it trains.

    Call it before `optimizer` is given to DeepSpeed.

    train: what the phase trains, as in FixRes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with briefly_frozen(model, train=train):
        frozen = {parameter for parameter in parameters if not parameter.requires_grad}
    if not frozen:
        return
    groups = []
    for group in optimizer.param_groups:
        for freezes in (False, True):
            members = [parameter for parameter in group["params"] if (parameter in frozen) == freezes]
            groups.append({**group, "params": members, _FREEZES: freezes})
    optimizer.param_groups[:] = [group for group in groups if group["params"]]
    _skip_when_frozen(optimizer, next(iter(frozen)))


def _skip_when_frozen(optimizer: Optimizer, one_of_them: Tensor) -> None:
    hidden: list[tuple[Tensor, Tensor | None]] = []

    def hide(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if one_of_them.requires_grad:
            return
        for group in optimizer.param_groups:  # with ZeRO, one at a time
            for flat in group["params"] if group[_FREEZES] else ():
                hidden.append((flat, flat.grad))
                flat.grad = None

    def show(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        while hidden:
            flat, flat.grad = hidden.pop()  # an offloaded optimizer's is a buffer that ZeRO uses again

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(show)
