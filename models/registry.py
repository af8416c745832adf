"""Model name in a recipe -> a function that builds the network."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

from torch import nn

# name -> (module, function). Every function takes num_classes and keyword arguments that a recipe may set.
_MODELS: dict[str, tuple[str, str]] = {
    **{
        name: (".resnet", name)
        for name in ("resnet_digits", "resnet20", "resnet18", "resnet34", "resnet50", "resnet101")
    },
    **{name: (".alexnet", name) for name in ("alexnet", "alexnet_torchvision", "alexnetish")},
    **{name: (".vit", name) for name in ("vit_b16", "vit_digits")},
}
# prefix -> module whose `find` takes what follows the prefix.
_LIBRARIES = {
    "torchvision.": ".libraries.torchvision_models",
    "timm.": ".libraries.timm_models",
    "hf.": ".libraries.hugging_face",
}


def names() -> list[str]:
    """Every built-in model's name, sorted; the prefixes `torchvision.`, `timm.` and `hf.` add those libraries'."""
    return sorted(_MODELS)


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds model `name`, called with num_classes and the recipe's other settings.

    Raises ValueError with the nearest match when there is none, and for a library that is not installed.
    """
    for prefix, module in _LIBRARIES.items():
        if name.startswith(prefix):
            return import_module(module, __package__).find(name.removeprefix(prefix))
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown model {name!r}; known: {', '.join(names())}, torchvision.<name>, timm.<name>, "
            f"hf.<id or folder>{hint}"
        )
    module, function = _MODELS[name]
    return getattr(import_module(module, __package__), function)
