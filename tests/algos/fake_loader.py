"""A training loader that satisfies the protocols of algos/framework/protocols.py and records what it served."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class Served(NamedTuple):
    """One batch."""

    epoch: int
    indices: list[int]
    image_size: int
    test_crop: bool


class FixedLoader:
    """Batches (images float64 [N, 3, S, S], labels [N]) of one rank, shuffled by the epoch, the last one not full."""

    image_size = 8
    batch_size = 8

    def __init__(self, *, num_samples: int = 24, rank: int = 0, world_size: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(num_samples) % 4
        noise = torch.randn(num_samples, 3, 16, 16, generator=generator, dtype=torch.float64)
        self.images = noise + self.labels.view(-1, 1, 1, 1) / 2
        self.served: list[Served] = []
        self.passes = 0  # Composer spins through one batch of every epoch that a resumed run has behind it
        self._rank, self._world_size = rank, world_size
        self._test_crop = False

    def _batches(self, epoch: int) -> list[torch.Tensor]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        return list(order[self._rank :: self._world_size].split(self.batch_size))

    def __len__(self) -> int:
        return len(self._batches(0))

    def __iter__(self) -> Any:
        epoch, self.passes = self.passes, self.passes + 1
        return self._serve(epoch, self._batches(epoch), self.image_size, self._test_crop)

    def _serve(self, epoch: int, batches: list[torch.Tensor], image_size: int, test_crop: bool) -> Any:
        for indices in batches:
            self.served.append(Served(epoch, indices.tolist(), image_size, test_crop))
            images = self.images[indices]
            if not test_crop:
                images = images.roll(epoch, dims=-1)
            yield F.adaptive_avg_pool2d(images, image_size), self.labels[indices]


class FakeLoader(FixedLoader):
    """The same, able to change its sizes and its crop."""

    def set_image_size(self, image_size: int) -> None:
        if image_size > 16:
            raise ValueError(f"image size {image_size}: the images have 16 px")
        self.image_size = image_size

    def set_batch_size(self, per_device_batch_size: int) -> None:
        if per_device_batch_size > len(self.labels):
            raise ValueError(f"batch size {per_device_batch_size}: there are {len(self.labels)} images")
        self.batch_size = per_device_batch_size

    def set_test_crop(self, enabled: bool) -> None:
        self._test_crop = enabled
