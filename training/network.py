"""The recipe's network, as initialized and as the algorithms change it."""

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
    """The recipe's network, initialized from the recipe's seed, identically on every rank.

    shapes_only: use torch's meta device, where initialization is free, unless weights are loaded or the model is hf.*.
    """
    settings = {key: value for key, value in recipe.model.items() if key != "name"}
    # Building a transformers model imports its architecture and torch's compiler, whose tensors must be real.
    on_meta = shapes_only and settings.get("weights") is None and not recipe.model["name"].startswith("hf.")
    if on_meta:
        with contextlib.suppress(ModuleNotFoundError):
            import_module("torchvision.models")  # most networks import it, and its tensors must be real
    seed_all(recipe.seed)
    with users_mistake("model"), _ShapesOnly() if on_meta else contextlib.nullcontext():
        return models.find(recipe.model["name"])(num_classes=num_classes, **settings)


def shapes_suffice(algorithms: Mapping[str, Any]) -> bool:
    """Whether `algorithms` work on a network without real weights; Composer's own copy weights to replace a layer."""
    return all(isinstance(one, SpeedUp) for one in _changing(algorithms))


def change_network(network: nn.Module, recipe: Recipe, algorithms: Mapping[str, Any]) -> nn.Module:
    """`network` as `algorithms` change it when training starts."""
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
    """Creates tensors on torch's meta device and skips random initialization, for which torch would import sympy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0]
        with torch.device("meta"):
            return func(*args, **kwargs)


def _state(network: nn.Module, recipe: Recipe, *, composers: bool) -> tuple[Any, Any]:
    """An algorithm's state and logger at INIT. Ours read only the network; Composer's own get Composer's State."""
    if not composers:
        log = SimpleNamespace(log_hyperparameters=_silent, log_metrics=_silent)
        return SimpleNamespace(model=network, algorithms=[], optimizers=[]), log
    from composer.core import State
    from composer.loggers import Logger
    from composer.utils import get_device

    state = State(rank_zero_seed=recipe.seed, model=network, run_name=recipe.run_name, device=get_device("cpu"))
    return state, Logger(state)
