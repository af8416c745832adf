"""Batches from a .beton file, decoded in threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..beton.format import Beton
from ..beton.tiers import Tiers
from ..decoding.decode import Decoder, make_decoder
from ..draws import images_of
from ..prefetch import PrefetchIterator
from .ahead import Ahead, BatchesAhead, timed
from .loader import Loader, Pass, Work
from .to_device import Batch, HostBuffers

_TimedBatch = tuple[Batch, list[float]]
_LEAST_IMAGES_IN_A_PART = 8  # fewer cost more to schedule than they gain


class FFCVLoader(Loader):
    """Reads a .beton file; all `num_workers` threads decode parts of the same batch.

    The first batch is therefore ready early, and memory does not grow with the threads: it is bounded by the batches
    ahead. The threads of a pass end with it; `next()` raises an error that occurs in one of them.

    Args:
        path: the .beton file. Where it was written at several sizes, each pass reads the smallest that serves its image
            size (see `data.beton.tiers.Tiers`).
        decoder: "native", "libffcv", or "auto" for the best one installed (see `data.decoding.decode`).
        tier_headroom: a tier's shorter side over the image size that training needs, at least 1; None is 1.5, or
            1 / `crop_ratio`. A large one reads the largest file in training at every size.
        batches_ahead: decoded batches that may wait for the consumer, at least 1; "auto": 2, and more if decoding times
            vary (see `data.loading.ahead`). It changes no pixels.
        settings: as for `Loader`, except `num_samples` and `class_names`, which the file sets.

    Attributes:
        decoder_name: the decoder in use.
        described: whether the file has a sidecar; without it, class names are numbers, mean and std ImageNet's.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged (see `Beton`), or a tier is missing.
        ModuleNotFoundError: the decoder is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        decoder: str = "auto",
        tier_headroom: float | None = None,
        batches_ahead: BatchesAhead = "auto",
        **settings: Any,
    ) -> None:
        self._decoder = make_decoder(decoder)
        self.decoder_name = self._decoder.name
        self._tiers = Tiers(path, headroom=tier_headroom)
        self._ahead = Ahead(batches_ahead)
        beton = self._tiers.largest
        super().__init__(num_samples=len(beton), class_names=beton.class_names, **settings)
        self.mean, self.std = beton.mean, beton.std
        self.described = beton.described

    def file_for(self, image_size: int, *, test_crop: bool = False) -> Path:
        """The file that a pass at `image_size` px reads, with training's crops or, for `test_crop`, evaluation's."""
        return self._tiers.serving(image_size, self._crops, augment=self.train and not test_crop).path

    def describe_tiers(self) -> list[str]:
        """A line for each smaller file: up to which image size training reads it."""
        return [f"{path} serves training at up to {px} px" for path, px in self._tiers.training_limits(self._crops)]

    def _labels(self) -> np.ndarray:
        return self._tiers.largest.labels

    def _decode(self, batches: list[Work], this_pass: Pass, buffers: HostBuffers) -> Generator[Batch, None, None]:
        num_parts = self._num_parts(max((len(indices) for indices, _ in batches), default=1))
        batch_bytes = max((3 * len(indices) * one.image_size**2 for indices, one in batches), default=1)
        num_ahead = self._ahead.begin(batch_bytes)
        buffers.reserve(batch_bytes)
        iterator = PrefetchIterator(
            self._tasks(batches, buffers),
            num_workers=self.num_workers,
            num_ahead=num_parts * num_ahead,
        )
        try:
            # Parts arrive in order, so a batch is complete when its last part is done.
            for done in iterator:
                if done is not None:
                    batch, seconds = done
                    iterator.num_ahead = num_parts * self._ahead.after(sum(seconds))
                    yield batch
        finally:
            iterator.close()

    def _num_parts(self, num_images: int) -> int:
        return max(1, min(self.num_workers, num_images // _LEAST_IMAGES_IN_A_PART))

    def _tasks(self, batches: list[Work], buffers: HostBuffers) -> Iterator[Callable[[], _TimedBatch | None]]:
        serving: dict[int, Beton] = {}
        for indices, this_pass in batches:
            size = this_pass.image_size
            if size not in serving:
                serving[size] = self._tiers.serving(size, self._crops, augment=this_pass.augment)
            beton = serving[size]
            images, memory = buffers.take(len(indices), this_pass.image_size)
            batch = images, torch.from_numpy(beton.labels[images_of(indices)])
            num_parts = self._num_parts(len(indices))
            seconds: list[float] = []  # of its parts
            parts = zip(np.array_split(indices, num_parts), np.array_split(memory, num_parts), strict=True)
            for number, (own_indices, own_memory) in enumerate(parts, start=1):
                decode = partial(_decode_part, self._decoder, beton, this_pass, own_indices, own_memory)
                result = (batch, seconds) if number == num_parts else None
                yield partial(_done, partial(timed, decode, seconds), result)


def _decode_part(decoder: Decoder, beton: Beton, this_pass: Pass, indices: np.ndarray, memory: np.ndarray) -> None:
    beton.check_size()
    images = images_of(indices)
    crops = this_pass.crop_rows(indices, beton.heights[images], beton.widths[images])
    decoder.decode(beton, images, crops, memory, exact=not this_pass.augment)
    this_pass.augment_images(indices, memory)


def _done(task: Callable[[], None], result: _TimedBatch | None) -> _TimedBatch | None:
    task()
    return result
