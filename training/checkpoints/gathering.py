"""A run's whole state, as Composer gathers it, in a tenth of the time where every rank has all of it.

Composer asks torch.distributed.checkpoint, which looks up each weight's name by walking through the network.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from composer.core import State
from composer.utils import collect_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.checkpoints.sharded import state_without_tensors

# In names of weights: of torch.compile, FSDP1, recomputation. Where there is one, Composer finds the plain name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Composer looks for it among its installed files each time.
collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)


def gather(state: State) -> dict[str, Any]:
    """What `state.state_dict()` returns; every rank must call this. Tensors share memory with the run's own.

    Of a sharded network rank 0 gets copies on the CPU, as from Composer.
    """
    network = _unwrapped(state.model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = state.optimizers[0]
    # Without a state, as before the first step, torch makes one; of a parameter that the network lacks it says so.
    by_composer = (
        state.fsdp_enabled
        or not optimizer.state
        or any(wrapper in name for wrapper in _WRAPPERS for name in names.values())
        or any(parameter not in names for group in optimizer.param_groups for parameter in group["params"])
    )
    if by_composer:
        return state.state_dict()
    return {
        "model": network.state_dict(),
        "optimizers": {type(optimizer).__qualname__: _by_name(optimizer.state_dict(), optimizer.param_groups, names)},
        **state_without_tensors(state),
    }


def parameters(model: nn.Module, gathered: dict[str, Any]) -> list[Tensor]:
    """The tensors of a gathered state's "model" that are no buffers."""
    buffers = {_plain(name) for name, _ in _unwrapped(model).named_buffers()}
    return [value for name, value in gathered["model"].items() if isinstance(value, Tensor) and name not in buffers]


def _by_name(saved: dict[str, Any], groups: Iterable[dict[str, Any]], names: dict[Tensor, str]) -> dict[str, Any]:
    """An optimizer's state dict with names of weights instead of their numbers."""
    ordered = [names[parameter] for group in groups for parameter in group["params"]]
    return {
        "state": {ordered[number]: values for number, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [ordered[number] for number in group["params"]]} for group in saved["param_groups"]
        ],
    }


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
