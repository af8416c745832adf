"""What both loaders share: position, sizes, order and crops. They differ only in how a batch is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..decoding.crops import CropSettings, Flip
from ..draws import images_of
from .augment import Augmentation, augment_batch, build_augmentations
from .order import eval_batches, mixed_batches, train_batches
from .to_device import Batch, HostBuffers, to_device

Sampler = Literal["shuffled", "balanced"]


@dataclass(frozen=True)
class Pass:
    """Everything except its index that determines an image's pixels in one pass over the data.

    image_size: px; of the largest images, where batches differ.
    """

    epoch: int
    seed: int
    image_size: int
    augment: bool
    crops: CropSettings
    augmentations: tuple[Augmentation, ...] = ()

    def crop_rows(self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """int32 [B, 5]: top, left, height, width in px, and the flip."""
        return self.crops.rows(indices, heights, widths, seed=self.seed, epoch=self.epoch, augment=self.augment)

    def at(self, image_size: int) -> Pass:
        """The same for images of another size."""
        return self if image_size == self.image_size else replace(self, image_size=image_size)

    def augment_images(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Augment uint8 [B, S, S, 3] in place; without augmentation this does nothing and needs no Pillow."""
        if self.augment and self.augmentations:
            augment_batch(images, indices, self.augmentations, seed=self.seed, epoch=self.epoch)


Work = tuple[np.ndarray, Pass]  # a batch's occurrences of images, and how they are decoded


class Loader(ABC):
    """Batches of one rank, as (images, labels): uint8 [B, 3, S, S] in channels-last memory, and int64 [B].

    Order and pixels depend only on the seed, the epoch and the images, not on the number of workers or ranks or on
    earlier batches. Every batch has its own memory.

    Sizes and position apply from the next `iter()`; a running pass keeps its own. Starting a pass closes the previous
    one. A pass counts as done once its first batch is requested: the next pass is the next epoch.

    Args:
        num_samples: images over all ranks.
        per_device_batch_size: images per batch on one rank.
        image_size: S, in px.
        train: True shuffles, crops at random and flips; False keeps the order and crops the center.
        num_workers: threads or processes that decode; 0 decodes in the calling thread.
        drop_last: drop the last training batch if it is not full. Evaluation never drops anything.
        crop_scale: range of a training crop's share of the image's area.
        crop_aspect: range of a training crop's width / height.
        crop_ratio: side of a square training crop over the image's shorter side; None uses crop_scale.
        flip: "random", "alternating" or "none": which images training mirrors left to right (see
            `data.decoding.crops.mirrored`).
        flip_probability: of a random flip.
        eval_crop_ratio: side of the evaluation crop over the image's shorter side.
        augmentations: further training augmentations, in order, each a name in
            `data.loading.augment.AUGMENTATIONS` and its settings: `[{"name": "color_jitter", "brightness": 0.4}]`.
        sampler: "shuffled" has every image once in a training pass, "balanced" every class equally often (see
            `data.loading.order.balanced_order`). A pass has the same length either way.
        device: of the batches. On CUDA they are copied ahead of the step, on a separate stream.

    Attributes:
        batch_size, image_size: of the next pass.
        num_samples, class_names: of the data.
        mean, std: per channel on the 0..255 scale.
        position: (epoch, batch) at which the next pass starts.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(
        self,
        *,
        num_samples: int,
        class_names: tuple[str, ...],
        per_device_batch_size: int,
        image_size: int,
        train: bool,
        seed: int = 0,
        num_workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
        crop_ratio: float | None = None,
        flip: Flip = "random",
        flip_probability: float = 0.5,
        eval_crop_ratio: float = 0.875,
        augmentations: Sequence[Mapping[str, Any]] = (),
        sampler: Sampler = "shuffled",
        device: torch.device | str = "cpu",
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers {num_workers}: give a whole number of at least 0")
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler {sampler!r}: give one of {', '.join(get_args(Sampler))}")
        self.num_samples = num_samples
        self.class_names = class_names
        self.train = train
        self.num_workers = num_workers
        self.position = (0, 0)
        self.device = torch.device(device)
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last
        self._balanced_labels = self._labels() if train and sampler == "balanced" else None
        self._test_crop = not train
        self._decoding: Generator[Batch, None, None] | None = None
        self._crops = CropSettings(
            scale=(crop_scale[0], crop_scale[1]),
            aspect=(crop_aspect[0], crop_aspect[1]),
            crop_ratio=crop_ratio,
            flip=flip,
            flip_probability=flip_probability,
            eval_crop_ratio=eval_crop_ratio,
        )
        self._augmentations = build_augmentations(augmentations)
        self._batch_shapes: list[tuple[int, int]] | None = None
        self.set_image_size(image_size)
        self.set_batch_size(per_device_batch_size)

    def set_image_size(self, image_size: int) -> None:
        """Set the next pass's image size, in px.

        Raises:
            ValueError: not a whole number of at least 1.
        """
        self.image_size = _whole(image_size, "image size", "px")
        self._batch_shapes = None

    def set_batch_size(self, per_device_batch_size: int) -> None:
        """Set the next pass's batch size per device.

        Raises:
            ValueError: not a whole number of at least 1, or the data do not fill a single batch.
        """
        size = _whole(per_device_batch_size, "per-device batch size", "images")
        self._index_batches(epoch=0, per_device_batch_size=size)
        self.batch_size = size
        self._batch_shapes = None

    def set_batch_shapes(self, shapes: Sequence[tuple[int, int]] | None) -> None:
        """Give every batch of the next training pass its (image size in px, images per device).

        The pass has as many batches; the last of them may ask for more images than are left, and is then dropped or
        split as any last one. None: all have the same sizes again, those of `set_image_size` and `set_batch_size`,
        which also end this.

        Raises:
            ValueError: no batch, or numbers that are no whole ones of at least 1; an evaluation loader.
        """
        if shapes is None:
            self._batch_shapes = None
            return
        if not self.train:
            raise ValueError(
                "batch shapes are for training, and this loader is for evaluation; use set_image_size and "
                "set_batch_size"
            )
        made = [(_whole(size, "image size", "px"), _whole(n, "per-device batch size", "images")) for size, n in shapes]
        if not self._index_mixed(made, epoch=0):
            raise ValueError(
                f"batch shapes {made[:3]}: {self.num_samples} images make no batch of these on {self._world_size} "
                "devices; lower the batch sizes"
            )
        self._batch_shapes = made

    def set_test_crop(self, enabled: bool) -> None:
        """From the next pass on, crop as in evaluation without augmentation (True), or as in training (False).

        The order stays that of training. An evaluation loader always uses the test crop.
        """
        self._test_crop = enabled or not self.train

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Start the next pass at batch number `batch` of `epoch`; the batches before it are not decoded.

        Raises:
            ValueError: a negative number. A batch beyond the end of the epoch raises when the pass starts, because
                the batch size may change until then.
        """
        if epoch < 0 or batch < 0:
            raise ValueError(f"position (epoch {epoch}, batch {batch}): both count from 0")
        self.position = (epoch, batch)

    def image_indices(self, epoch: int, batch: int) -> np.ndarray:
        """This rank's images in batch `batch` of `epoch`, both from 0, at the current batch size: int64 [B]."""
        return images_of(self._index_pass(epoch)[batch])

    def __len__(self) -> int:
        """Batches in a full pass at the current batch size, the same on every rank."""
        return len(self._index_pass(epoch=0))

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.position
        batches = self._index_pass(epoch)
        if first > len(batches):
            raise ValueError(
                f"position (epoch {epoch}, batch {first}): an epoch has {len(batches)} batches of {self.batch_size}; "
                "give a smaller batch number, or the batch size that the position was taken at"
            )
        sizes = [size for size, _ in self._batch_shapes or [(self.image_size, 0)] * len(batches)][: len(batches)]
        this_pass = Pass(epoch, self._seed, max(sizes), not self._test_crop, self._crops, self._augmentations)
        if self._decoding is not None:
            self._decoding.close()
            self._decoding = None
        sized = [(indices, this_pass.at(size)) for indices, size in zip(batches, sizes, strict=True)]
        return self._serve(sized[first:], this_pass)

    def _serve(self, batches: list[Work], this_pass: Pass) -> Generator[Batch, None, None]:
        # Runs from the first next() on. A pass that stops early counts too: otherwise a loop that takes a few batches
        # per epoch would see the same images forever.
        self.position = (this_pass.epoch + 1, 0)
        buffers = HostBuffers(self.device)
        decoding = self._decoding = self._decode(batches, this_pass, buffers)
        try:
            for batch in to_device(decoding, self.device, release=buffers.release):
                yield batch
                if self._decoding is not decoding:
                    raise RuntimeError("this pass over the data is over: a newer one over the same loader has begun")
        finally:
            decoding.close()

    def _index_pass(self, epoch: int) -> list[np.ndarray]:
        """This rank's images of each batch, at the sizes of the next pass."""
        if self._batch_shapes is not None:
            return self._index_mixed(self._batch_shapes, epoch=epoch)
        return self._index_batches(epoch=epoch, per_device_batch_size=self.batch_size)

    def _index_mixed(self, shapes: Sequence[tuple[int, int]], *, epoch: int) -> list[np.ndarray]:
        return mixed_batches(
            self.num_samples,
            per_device_batch_sizes=[images for _, images in shapes],
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            drop_last=self._drop_last,
            balanced_labels=self._balanced_labels,
        )

    def _index_batches(self, *, epoch: int, per_device_batch_size: int) -> list[np.ndarray]:
        if not self.train:
            return eval_batches(
                self.num_samples,
                per_device_batch_size=per_device_batch_size,
                rank=self._rank,
                world_size=self._world_size,
            )
        return train_batches(
            self.num_samples,
            per_device_batch_size=per_device_batch_size,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            drop_last=self._drop_last,
            balanced_labels=self._balanced_labels,
        )

    @abstractmethod
    def _labels(self) -> np.ndarray:
        """int64 [num_samples]: the label of each image. Called before the subclass's own __init__ is through."""

    @abstractmethod
    def _decode(self, batches: list[Work], this_pass: Pass, buffers: HostBuffers) -> Generator[Batch, None, None]:
        """The batches of one pass, given the occurrences of images in each. Closing it stops the decoding.

        A batch's own pass is `this_pass` but for the image size.

        Images in memory of `buffers` are given back once they are on the device.
        """


def _whole(value: int, what: str, unit: str) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{what} {value}: give a whole number of {unit}, at least 1")
    return int(value)
