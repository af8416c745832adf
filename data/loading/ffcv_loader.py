"""Batches from a .beton file, decoded in threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..beton.format import Beton
from ..decoding.decode import Decoder, make_decoder
from ..prefetch import PrefetchIterator
from .loader import Batch, Loader, Pass, empty_images

_LEAST_IMAGES_IN_A_PART = 8  # fewer cost more to schedule than they gain


class FFCVLoader(Loader):
    """Reads a .beton file; all `num_workers` threads decode parts of the same batch.

    The first batch is therefore ready early, and memory does not grow with the threads: about two batches are buffered.
    The threads of a pass end with it; `next()` raises an error that occurs in one of them.

    Args:
        path: the .beton file.
        decoder: "native", "libffcv", or "auto" for the best one installed (see `data.decoding.decode`).
        settings: as for `Loader`, except `num_samples` and `class_names`, which the file sets.

    Attributes:
        decoder_name: the decoder in use.
        described: whether the file has a sidecar; without it, class names are numbers, mean and std ImageNet's.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged (see `Beton`).
        ModuleNotFoundError: the decoder is not installed.
    """

    def __init__(self, path: str | Path, *, decoder: str = "auto", **settings: Any) -> None:
        self._decoder = make_decoder(decoder)
        self.decoder_name = self._decoder.name
        self._beton = Beton(path)
        super().__init__(num_samples=len(self._beton), class_names=self._beton.class_names, **settings)
        self.mean, self.std = self._beton.mean, self._beton.std
        self.described = self._beton.described

    def _decode(self, batches: list[np.ndarray], this_pass: Pass) -> Generator[Batch, None, None]:
        num_ahead = 2 * self._num_parts(self.batch_size)  # two buffered batches
        iterator = PrefetchIterator(self._tasks(batches, this_pass), num_workers=self.num_workers, num_ahead=num_ahead)
        try:
            # Parts arrive in order, so a batch is complete when its last part is done.
            yield from (batch for batch in iterator if batch is not None)
        finally:
            iterator.close()

    def _num_parts(self, num_images: int) -> int:
        return max(1, min(self.num_workers, num_images // _LEAST_IMAGES_IN_A_PART))

    def _tasks(self, batches: list[np.ndarray], this_pass: Pass) -> Iterator[Callable[[], Batch | None]]:
        for indices in batches:
            images, memory = empty_images(len(indices), this_pass.image_size, pinned=self.device.type == "cuda")
            batch = images, torch.from_numpy(self._beton.labels[indices])
            num_parts = self._num_parts(len(indices))
            parts = zip(np.array_split(indices, num_parts), np.array_split(memory, num_parts), strict=True)
            for number, (own_indices, own_memory) in enumerate(parts, start=1):
                decode = partial(_decode_part, self._decoder, self._beton, this_pass, own_indices, own_memory)
                yield partial(_done, decode, batch if number == num_parts else None)


def _decode_part(decoder: Decoder, beton: Beton, this_pass: Pass, indices: np.ndarray, memory: np.ndarray) -> None:
    beton.check_size()
    crops = this_pass.crop_rows(indices, beton.heights[indices], beton.widths[indices])
    decoder.decode(beton, indices, crops, memory, exact=not this_pass.augment)
    this_pass.augment_images(indices, memory)


def _done(task: Callable[[], None], result: Batch | None) -> Batch | None:
    task()
    return result
