"""Batches from a .beton file, decoded in threads."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.beton import Beton
from data.decode import Decoder, make_decoder
from data.loader import Batch, Loader, Pass, empty_images
from data.prefetch import PrefetchIterator


class FFCVLoader(Loader):
    """Reads a .beton file; each of `num_workers` threads decodes a whole batch at a time.

    At most `num_workers + 2` batches are decoded ahead, the threads of a pass end with it, and an error in one of them
    is raised where the batch is asked for.

    Args:
        path: the .beton file.
        decoder: "native", "libffcv", or "auto" for the best one installed (see `data.decode`).
        settings: those of `Loader`, but for `num_samples` and `class_names`, which the file knows.

    Attributes:
        decoder_name: which decoder it came to.
        described: whether the file has a sidecar; without it, class names are numbers, mean and std ImageNet's.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is not whole (see `Beton`).
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
        decode = partial(_decode_batch, self._decoder, self._beton, this_pass, pinned=self.device.type == "cuda")
        tasks = (partial(decode, indices) for indices in batches)
        iterator = PrefetchIterator(tasks, num_workers=self.num_workers)
        try:
            yield from iterator
        finally:
            iterator.close()


def _decode_batch(decoder: Decoder, beton: Beton, this_pass: Pass, indices: np.ndarray, *, pinned: bool) -> Batch:
    crops = this_pass.crop_rows(indices, beton.heights[indices], beton.widths[indices])
    images, memory = empty_images(len(indices), this_pass.image_size, pinned=pinned)
    decoder.decode(beton, indices, crops, memory, exact=not this_pass.augment)
    this_pass.augment_images(indices, memory)
    return images, torch.from_numpy(beton.labels[indices])
