"""timm's classifiers by name, when timm is installed."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..weights import load_weights


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds timm's classifier `name`. Raises ValueError if it or timm is missing."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"timm.{name} needs timm: pip install timm") from None
    architecture = name.partition(".")[0]  # the suffix names weights: vit_base_patch16_224.augreg_in21k
    known = timm.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1)
        hint = f"; did you mean timm.{near[0]}?" if near else ""
        raise ValueError(f"timm has no model {architecture!r}{hint}")

    def build(
        *,
        num_classes: int,
        image_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> nn.Module:
        return build_timm(
            name,
            num_classes=num_classes,
            image_size=image_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
        )

    return build


def build_timm(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    weights: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """timm's classifier `name` with a head for `num_classes`.

    image_size: px, for architectures with a fixed size (timm's img_size); None keeps the architecture's own.
    drop_rate: dropout before the classifier, in [0, 1).
    drop_path_rate: stochastic depth, in [0, 1); None keeps the architecture's own.
    weights: "pretrained" loads timm's, from its cache or the hub; else a file, see `models.weights.load_weights`.
    gradient_checkpointing: timm's own; not with batch norm, which would count every batch twice.

    Raises ValueError for what timm refuses, weights that are missing or do not fit, and checkpointing of a network
    with batch norm.
    """
    import timm  # pyright: ignore[reportMissingImports]

    given = {"img_size": image_size, "drop_path_rate": drop_path_rate}
    settings = {key: value for key, value in given.items() if value is not None}
    for key, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate or 0.0)):
        if not 0 <= rate < 1:
            raise ValueError(f"{key} {rate} must lie in [0, 1); 0 drops nothing")
    try:
        model = timm.create_model(
            name, pretrained=weights == "pretrained", num_classes=num_classes, drop_rate=drop_rate, **settings
        )
    except (OSError, RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {name} with {settings}: {' '.join(str(error).split())[:200]}") from None
    if weights not in (None, "pretrained"):
        load_weights(model, weights)
    if gradient_checkpointing:
        _checkpoint(model, name)
    return model


def _checkpoint(model: nn.Module, name: str) -> None:
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(
            f"gradient_checkpointing is true and timm's {name} has batch norm, whose running statistics would move "
            "twice a step; set it to false, or use torchvision's or this project's network"
        )
    model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
