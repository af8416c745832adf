"""Published classifiers with their published head: what they classify, and the normalization that they expect."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

PREFIXES = ("torchvision.", "timm.", "hf.")
_FEWEST_LABELS = 2  # transformers' number, where a configuration tells none


@dataclass(frozen=True)
class Published:
    """A classifier that its library has weights for.

    mean, std: per channel, on the 0..255 scale. build: the network, with its weights (which may be downloaded) or,
    given False, without.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    build: Callable[[bool], nn.Module]


def find_published(name: str) -> Published:
    """The classifier `torchvision.NAME`, `timm.NAME` or `hf.ID` with its library's default weights.

    Raises ValueError if there is none, its library is not installed, or its normalization is not known.
    """
    library, _, rest = name.partition(".")
    finders = {"torchvision": _of_torchvision, "timm": _of_timm, "hf": _of_hugging_face}
    if library not in finders:
        raise ValueError(f"{name!r} must begin with one of {', '.join(PREFIXES)}")
    return finders[library](rest)


def _of_torchvision(name: str) -> Published:
    from .torchvision_models import find

    builder = find(name)
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)["DEFAULT"]
    made = weights.transforms()
    return Published(
        num_classes=len(weights.meta["categories"]),
        mean=_of_255(made.mean),
        std=_of_255(made.std),
        build=lambda with_weights: builder(
            num_classes=len(weights.meta["categories"]), weights=weights.name if with_weights else None
        ),
    )


def _of_timm(name: str) -> Published:
    from .timm_models import find

    builder = find(name)
    import timm  # pyright: ignore[reportMissingImports]

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(f"timm has no weights for {name}; use one that timm.list_pretrained() has")
    return Published(
        num_classes=config.num_classes,
        mean=_of_255(config.mean),
        std=_of_255(config.std),
        build=lambda with_weights: builder(
            num_classes=config.num_classes, weights="pretrained" if with_weights else None
        ),
    )


def _of_hugging_face(name: str) -> Published:
    from .hugging_face import find, find_file

    builder = find(name)
    config = json.loads(find_file(name, "config.json").read_text())
    num_classes = len(config.get("id2label") or range(_FEWEST_LABELS))
    processor = json.loads(find_file(name, "preprocessor_config.json").read_text())
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    elif "image_mean" in processor and "image_std" in processor:
        mean, std = processor["image_mean"], processor["image_std"]
    else:
        raise ValueError(
            f"hf.{name} does not say how its images are normalized (preprocessor_config.json); use another"
        )
    return Published(
        num_classes=num_classes,
        mean=_of_255(mean),
        std=_of_255(std),
        build=lambda with_weights: builder(num_classes=num_classes, weights="pretrained" if with_weights else None),
    )


def _of_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(255 * float(value) for value in values)
