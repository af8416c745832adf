"""The recipe's network, as it is initialized and as the algorithms then change it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from algos.framework.base import Event, Resource, SpeedUp
from models import registry as models
from training.recipe import Recipe, users_mistake

_DRAWS = ("erfinv_", "normal_", "uniform_")


def make_network(recipe: Recipe, *, num_classes: int, shapes_only: bool = False) -> nn.Module:
    """The recipe's network, initialized from its seed alike on every rank.

    shapes_only: on torch's meta device, where initializing costs nothing. Weights that are read need a real one.
    """
    settings = {key: value for key, value in recipe.model.items() if key != "name"}
    # transformers imports an architecture when it is built, and torch's compiler with it, whose tensors must be real.
    on_meta = shapes_only and settings.get("weights") is None and not recipe.model["name"].startswith("hf.")
    if on_meta:
        with contextlib.suppress(ModuleNotFoundError):
            import_module("torchvision.models")  # most networks import it, and it makes tensors that must be real
    seed_all(recipe.seed)
    with users_mistake("model"), _ShapesOnly() if on_meta else contextlib.nullcontext():
        return models.find(recipe.model["name"])(num_classes=num_classes, **settings)


def shapes_suffice(algorithms: Mapping[str, Any]) -> bool:
    """Whether `algorithms` change a network of shapes alone; Composer's own copy weights where they replace a layer."""
    return all(isinstance(one, SpeedUp) for one in _changing(algorithms))


def change_network(network: nn.Module, recipe: Recipe, algorithms: Mapping[str, Any]) -> nn.Module:
    """`network` with `algorithms` having changed it, as they do when training starts."""
    state, logger = _state(network, recipe, composers=not shapes_suffice(algorithms))
    for algorithm in _changing(algorithms):
        algorithm.apply(Event.INIT, state, logger)
    return state.model


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, as Composer's function of this name does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def _changing(algorithms: Mapping[str, Any]) -> list[Any]:
    return [
        one
        for one in algorithms.values()
        if Event.INIT in one.events and Resource.MODEL in one.contract.writes and hasattr(one, "apply")
    ]


def _silent(*given: Any, **named: Any) -> None:
    """Discards what is logged while planning."""


class _ShapesOnly(TorchFunctionMode):
    """Tensors are made on torch's meta device, and nothing is drawn for them: torch would import sympy to do so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0]
        with torch.device("meta"):
            return func(*args, **kwargs)


def _state(network: nn.Module, recipe: Recipe, *, composers: bool) -> tuple[Any, Any]:
    """What an algorithm is given at INIT. Ours look at the network alone; Composer's own get Composer's own State."""
    if not composers:
        log = SimpleNamespace(log_hyperparameters=_silent, log_metrics=_silent)
        return SimpleNamespace(model=network, algorithms=[], optimizers=[]), log
    from composer.core import State
    from composer.loggers import Logger
    from composer.utils import get_device

    state = State(rank_zero_seed=recipe.seed, model=network, run_name=recipe.run_name, device=get_device("cpu"))
    return state, Logger(state)
