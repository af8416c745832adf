"""Normalizes uint8 images on their device, so that transfers take a quarter of the bytes of float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


def normalize(
    images: torch.Tensor, *, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(images - mean) / std per channel; keeps the memory format.

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: one number per channel, on the 0..255 scale.
        dtype: of the result; the arithmetic is done in float32.

    Raises:
        TypeError: the images are not uint8, for example already normalized.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images of {images.dtype} on their way into normalize; it takes uint8, 0..255: normalize once")
    mean_c11, std_c11 = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return images.float().sub_(mean_c11).div_(std_c11).to(dtype)


class Normalizer:
    """`normalize` for whole batches (images, labels), as Composer's `DataSpec(batch_transforms=...)` calls it."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype = torch.float32) -> None:
        if min(std) <= 0:
            raise ValueError(f"std {tuple(std)}: every channel's must be above 0, on the 0..255 scale")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.dtype = dtype

    def __call__(self, batch: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        images, labels = batch
        return normalize(images, mean=self.mean, std=self.std, dtype=self.dtype), labels


@functools.lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Made once: the host waits for a GPU when it copies numbers there.
    with torch.inference_mode(False):
        return torch.as_tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
