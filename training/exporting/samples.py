"""Images to compare an exported network with its original on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import build_source
from training.trained import Trained

TOLERANCE = 1e-4  # of a logit, or of the largest logit where that is above 1


@dataclass(frozen=True)
class Samples:
    """A few normalized images, float32 [N, 3, S, S], and what they are, in words."""

    images: Tensor
    origin: str


def sample_images(trained: Trained, *, count: int = 16) -> Samples:
    """Evenly spaced images of the run's evaluation split, or random pixels where its data are not on this machine."""
    prepared = _evaluation_images(trained, count)
    origin = f"evaluation images of {trained.recipe.data.source['name']}"
    if prepared is None:
        shape = (count, 3, *[trained.preprocessing.image_size] * 2)
        prepared = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        origin = "images of random pixels (the run's data are not here)"
    return Samples(trained.preprocessing.normalized(prepared), f"{len(prepared)} {origin}")


@torch.inference_mode()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, K]."""
    return network(images).float()


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays of logits, as a share of the largest logit where that is above 1."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max()))
    return difference if np.isfinite(difference) else float("inf")


def _evaluation_images(trained: Trained, count: int) -> Tensor | None:
    settings: dict[str, Any] = dict(trained.recipe.data.source)
    if "download" in settings:
        settings["download"] = False
    try:
        source = build_source(**settings, split="eval")
        indices = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
        return torch.stack([trained.preprocessing.pixels(source.image(int(index))) for index in indices])
    except (OSError, ValueError, ModuleNotFoundError):  # absent or damaged; an export needs no data
        return None
