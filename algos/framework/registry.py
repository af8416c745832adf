"""YAML name -> algorithm. One line here makes an algorithm known to recipes, plans, docs and the generic tests."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import SpeedUp

_PACKAGE = __name__.rpartition(".framework.")[0]  # where the algorithms are

# name in a recipe -> (module, class, functional form, one-line description for tables)
_ALGORITHMS: dict[str, tuple[str, str, str, str]] = {
    "blurpool": (".blurpool", "BlurPool", "apply_blurpool", "anti-aliased strided convolutions and max-pools"),
    "channels_last": (".channels_last", "ChannelsLast", "apply_channels_last", "NHWC memory format for the model"),
    "cutmix": (".cutmix", "CutMix", "cutmix_batch", "a box of another sample in each image, targets mixed by area"),
    "distillation": (
        ".distillation",
        "Distillation",
        "distillation_loss",
        "the outputs of a trained network as further targets",
    ),
    "ema": (".ema", "EMA", "ema_update", "evaluation and export of averaged weights"),
    "fixres": (".fixres", "FixRes", "freeze_for_fixres", "last epochs at test resolution with the test-time crop"),
    "label_smoothing": (".label_smoothing", "LabelSmoothing", "smooth_labels", "targets a little less than certain"),
    "mixup": (".mixup", "MixUp", "mixup_batch", "convex combinations of images and of their targets"),
    "patch_dropout": (
        ".patch_dropout",
        "PatchDropout",
        "apply_patch_dropout",
        "a random part of each image's patches for Vision Transformers",
    ),
    "progressive_resizing": (
        ".progressive_resizing",
        "ProgressiveResizing",
        "stage_at",
        "small images first, decoded at the size they are trained at",
    ),
    "randaugment": (
        ".randaugment",
        "RandAugment",
        "randaugment_batch",
        "random operations on every image, on the device",
    ),
    "sam": (".sam", "SAM", "sam_gradients", "gradients at the worst point nearby, for flatter minima"),
    "selective_backprop": (
        ".selective_backprop",
        "SelectiveBackprop",
        "select_samples",
        "backward passes for the samples with high losses only",
    ),
    "stochastic_depth": (
        ".stochastic_depth",
        "StochasticDepth",
        "apply_stochastic_depth",
        "residual branches left out at random while training",
    ),
}


def names() -> list[str]:
    """Every algorithm's name in a recipe, sorted."""
    return sorted(_ALGORITHMS)


def composer_names() -> list[str]:
    """Names in a recipe of Composer's own algorithms, `composer.ema` and so on, sorted."""
    from .composer_algorithms import names

    return names()


def maker(name: str) -> Callable[..., Any]:
    """The callable that makes the algorithm of a recipe's `name`: the class that `find` returns, or for
    `composer.<name>` a function that makes Composer's own. Its signature is the settings.

    Raises ValueError with the nearest match when there is none.
    """
    from . import composer_algorithms

    return composer_algorithms.find(name) if name.startswith(composer_algorithms.PREFIX) else find(name)


def planner(name: str) -> Callable[..., Any]:
    """As `maker`, for planning without training (`SpeedUp.for_planning`): imports Composer only for Composer's own
    algorithms.
    """
    from . import composer_algorithms

    return composer_algorithms.find(name) if name.startswith(composer_algorithms.PREFIX) else find(name).for_planning


def find(name: str) -> type[SpeedUp]:
    """The class of a recipe's `name`; imports only that algorithm's module.

    Raises ValueError with the nearest match when there is none.
    """
    module, class_name, _, _ = _entry(name)
    return getattr(import_module(module, _PACKAGE), class_name)


def functional_name(name: str) -> str:
    """Name of the algorithm's functional form, importable from `algos`."""
    return _entry(name)[2]


def description(name: str) -> str:
    """One line for tables."""
    return _entry(name)[3]


def public_names() -> dict[str, str]:
    """Every public class and functional form of the algorithms -> the module that defines it."""
    public: dict[str, str] = {}
    for module, class_name, function_name, _ in _ALGORITHMS.values():
        public[class_name] = public[function_name] = module
    return public


def _entry(name: str) -> tuple[str, str, str, str]:
    if name not in _ALGORITHMS:
        near = difflib.get_close_matches(name, _ALGORITHMS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(names())}{hint}")
    return _ALGORITHMS[name]
