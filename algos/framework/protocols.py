"""What the algorithms ask of objects that they do not own. Structural: nothing needs to import this to satisfy it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ResizableLoader(Protocol):
    """A data loader that can change image size and batch size between passes over the data.

    Setters take effect at the next `iter()`; a pass that is under way keeps its sizes. `len()` answers for the next
    pass. Every rank must be given the same values.
    """

    image_size: int  # px, side of the square images of the next pass
    batch_size: int  # images a device of the next pass (Composer reads this name)

    def set_image_size(self, image_size: int) -> None:
        """Side in px of the images of the next pass."""
        ...

    def set_batch_size(self, per_device_batch_size: int) -> None:
        """Images a device in a batch of the next pass."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class CropSwitchingLoader(Protocol):
    """A training loader that can serve its images as evaluation does: FixRes trains its last phase this way."""

    def set_test_crop(self, enabled: bool) -> None:
        """From the next pass on, crop as evaluation does and augment nothing (True), or as in training (False)."""
        ...


@runtime_checkable
class LearningRateModifier(Protocol):
    """An algorithm with a say in the learning rate. `LearningRate` asks every such algorithm in the order they act."""

    def modify_learning_rate(self, learning_rate: float, epoch: float, total_epochs: float) -> float:
        """The learning rate at `epoch` (a fraction within an epoch), given what the schedule and the others made it."""
        ...
