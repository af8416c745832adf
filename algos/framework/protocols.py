"""Interfaces that the algorithms expect of other objects. Structural: implementations need not import this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ResizableLoader(Protocol):
    """A data loader that can change image size and batch size between passes over the data.

    Setters take effect at the next `iter()`; a running pass keeps its sizes. `len()` is that of the next pass. Every
    rank must be given the same values.
    """

    image_size: int  # px, side of the square images of the next pass
    batch_size: int  # images per device in the next pass (Composer reads this name)

    def set_image_size(self, image_size: int) -> None:
        """Set the next pass's image size, in px."""
        ...

    def set_batch_size(self, per_device_batch_size: int) -> None:
        """Set the next pass's batch size per device."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class MixedSizesLoader(ResizableLoader, Protocol):
    """A `ResizableLoader` whose batches can differ in size within a pass."""

    num_samples: int  # images of an epoch, over all ranks

    def set_batch_shapes(self, shapes: Sequence[tuple[int, int]] | None) -> None:
        """Give every batch of the next pass its (image size in px, images per device); None: all have the same again.

        The order of the images stays that of other passes: it is cut into batches of these lengths. The last one may
        ask for more images than are left.
        """
        ...


@runtime_checkable
class CropSwitchingLoader(Protocol):
    """A training loader that can serve its images as in evaluation: FixRes trains its last phase this way."""

    def set_test_crop(self, enabled: bool) -> None:
        """From the next pass on, crop as in evaluation without augmentation (True), or as in training (False)."""
        ...


@runtime_checkable
class LearningRateModifier(Protocol):
    """An algorithm that changes the learning rate. `LearningRate` calls every such algorithm in the order they act."""

    def modify_learning_rate(self, learning_rate: float, epoch: float, total_epochs: float) -> float:
        """The learning rate at `epoch` (may be fractional), given the rate of the schedule and earlier algorithms."""
        ...
