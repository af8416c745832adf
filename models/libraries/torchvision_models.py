"""torchvision's classifiers by name, with weights and gradient checkpointing."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..weights import finish

# In training these return tuples with auxiliary logits unless disabled.
_WITHOUT_AUXILIARY = {"googlenet": {"aux_logits": False, "init_weights": True}}
_WITHOUT_AUXILIARY["inception_v3"] = _WITHOUT_AUXILIARY["googlenet"]


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds torchvision's classifier `name`. Raises ValueError when there is none."""
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean torchvision.{near[0]}?" if near else ""
        raise ValueError(f"torchvision has no classifier {name!r}{hint}")

    def build(
        *,
        num_classes: int,
        dropout: float | None = None,
        weights: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> nn.Module:
        return build_torchvision(
            name,
            num_classes=num_classes,
            dropout=dropout,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
        )

    return build


def build_torchvision(
    name: str,
    *,
    num_classes: int,
    dropout: float | None = None,
    weights: str | None = None,
    gradient_checkpointing: bool = False,
    **settings: Any,
) -> nn.Module:
    """torchvision's classifier `name` with a head for `num_classes`.

    dropout: of every nn.Dropout, in [0, 1); None keeps torchvision's.
    weights: torchvision's name for them, or a file (see `models.weights.load_weights`); None for random ones.
    gradient_checkpointing: recompute each residual block's activations in the backward pass.
    settings: for torchvision's constructor.

    Raises ValueError for a dropout out of range or of a network that has none, for weights that are missing or do not
    fit, and for checkpointing a network without blocks.
    """
    import torchvision.models

    settings = {**_WITHOUT_AUXILIARY.get(name, {}), **settings}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **settings)
    if dropout is not None:
        _set_dropout(model, dropout, name)
    return finish(model, weights, architecture=name, gradient_checkpointing=gradient_checkpointing)


def _set_dropout(model: nn.Module, dropout: float, name: str) -> None:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must lie in [0, 1); 0 drops nothing")
    if not layers:
        raise ValueError(f"dropout is {dropout} and torchvision's {name} has no dropout; leave it out")
    for layer in layers:
        layer.p = dropout
