"""The same batches without FFCV: torch's DataLoader and torchvision's transforms over a Source."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from ..draws import images_of
from ..sources import Source, channel_statistics, labels_of
from .loader import Loader, Pass, Work
from .to_device import Batch, HostBuffers, empty_images

_Item = tuple[int, Pass]


class TorchLoader(Loader):
    """Decodes a Source in `num_workers` processes, in the order and with the crops of `FFCVLoader`.

    Workers stay alive between passes, so every index carries the image size and the epoch. torch's global generator
    is not used.

    Args:
        source: the images.
        settings: as for `Loader`, except `num_samples` and `class_names`, which the source sets.
    """

    def __init__(self, source: Source, **settings: Any) -> None:
        self._source = source
        super().__init__(num_samples=len(source), class_names=source.class_names, **settings)
        self._sampler = _PassSampler()
        self._dataloader = DataLoader(
            _CroppedImages(source),
            batch_sampler=self._sampler,  # pyright: ignore[reportArgumentType] (items are not plain indices)
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(0),  # for the workers' seeds, which nothing here uses
        )

    @cached_property
    def _statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return channel_statistics(self._source)

    @property
    def mean(self) -> tuple[float, float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Per channel, on the 0..255 scale; computed from up to 2,000 images on first use."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Per channel, on the 0..255 scale; computed from up to 2,000 images on first use."""
        return self._statistics[1]

    def _labels(self) -> np.ndarray:
        return labels_of(self._source)

    def _decode(self, batches: list[Work], this_pass: Pass, buffers: HostBuffers) -> Generator[Batch, None, None]:
        self._sampler.batches = [[(int(index), own_pass) for index in indices] for indices, own_pass in batches]
        yield from self._dataloader


class _PassSampler:
    """Batch sampler that yields the batches of the current pass."""

    def __init__(self) -> None:
        self.batches: list[list[_Item]] = []

    def __iter__(self) -> Iterator[list[_Item]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _CroppedImages(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, item: _Item) -> tuple[torch.Tensor, int]:
        index, this_pass = item
        number = int(images_of(np.array(index)))
        image = self._source.image(number)
        height, width = image.shape[:2]
        rows = this_pass.crop_rows(np.array([index]), np.array([height]), np.array([width]))
        top, left, crop_height, crop_width, flip = rows[0].tolist()
        size = [this_pass.image_size, this_pass.image_size]
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        pixels = functional.resized_crop(pixels, top, left, crop_height, crop_width, size, antialias=True)
        if flip:
            pixels = functional.horizontal_flip(pixels)
        images = pixels.permute(1, 2, 0).contiguous()
        this_pass.augment_images(np.array([index]), images[None].numpy())
        return images.permute(2, 0, 1), self._source.label(number)


def _collate(samples: list[tuple[torch.Tensor, int]]) -> Batch:
    images, _ = empty_images(len(samples), samples[0][0].shape[-1])
    for destination, (pixels, _) in zip(images, samples, strict=True):
        destination.copy_(pixels)
    return images, torch.tensor([label for _, label in samples], dtype=torch.int64)
