"""Model name in a recipe -> a function that builds the network."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

from torch import nn

# name -> (module, function). Every function takes num_classes and keyword arguments that a recipe may set.
_MODELS: dict[str, tuple[str, str]] = {
    name: (".resnet", name) for name in ("resnet_digits", "resnet20", "resnet18", "resnet34", "resnet50", "resnet101")
}
_TORCHVISION = "torchvision."


def names() -> list[str]:
    """Every built-in model's name, sorted; `torchvision.<name>` reaches torchvision's classifiers besides."""
    return sorted(_MODELS)


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds model `name`, called with num_classes and the recipe's other settings.

    Raises ValueError with the nearest match when there is none.
    """
    if name.startswith(_TORCHVISION):
        return _find_torchvision(name)
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}, torchvision.<name>{hint}")
    module, function = _MODELS[name]
    return getattr(import_module(module, __package__), function)


def _find_torchvision(name: str) -> Callable[..., nn.Module]:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix(_TORCHVISION)
    if short not in known:
        near = difflib.get_close_matches(short, known, n=1)
        hint = f"; did you mean torchvision.{near[0]}?" if near else ""
        raise ValueError(f"torchvision has no classifier {short!r}{hint}")

    def build(*, num_classes: int, dropout: float | None = None) -> nn.Module:
        settings = {} if dropout is None else {"dropout": dropout}
        return torchvision.models.get_model(short, weights=None, num_classes=num_classes, **settings)

    return build
