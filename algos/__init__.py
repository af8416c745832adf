"""Training speed-ups for image classifiers: pure functions, and Composer algorithms built on them.

Names are imported on first use, so importing one algorithm loads only that one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MORE = {
    "Contract": ".framework.base",
    "LearningRate": ".learning_rate",
    "Resource": ".framework.base",
    "SpeedUp": ".framework.base",
    "Stage": ".resizing.stages",
    "arrange": ".framework.ordering",
    "averaged_state_dict": ".ema",
    "averaged_weights": ".ema",
    "draw_cutmix": ".cutmix",
    "draw_kept_patches": ".patch_dropout",
    "draw_loss_ranks": ".selective_backprop",
    "draw_mixup": ".mixup",
    "draw_randaugment": ".randaugment",
    "draw_stochastic_depth": ".stochastic_depth",
    "frozen_statistics": ".sam",
    "phase_learning_rate": ".fixres",
    "ramp_stages": ".resizing.stages",
    "resize_images": ".progressive_resizing",
    "soft_target_loss": ".distillation",
    "warmup_decay": ".learning_rate",
}


def __getattr__(name: str) -> Any:
    module = _public_names().get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__dir__())}")
    return getattr(import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted(_public_names())


def _public_names() -> dict[str, str]:
    from .framework.registry import public_names

    return public_names() | _MORE
