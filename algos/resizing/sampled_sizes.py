"""Image sizes drawn anew for each step: mostly small ones early in the run, mostly large ones late.

The distribution is that of timm's scheduled batch sampler (since version 1.0.29) in its progressive mode; unlike there,
an epoch has every image once, however large the batches that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..framework.randomness import generator_at

Shape = tuple[int, int]  # image size in px, images per device


def size_probabilities(
    num_sizes: int, *, progress: float, spread: float = 0.65, uniform_share: float = 0.1
) -> np.ndarray:
    """float64 [K]: the probability of each of K sizes, from the first to the last, for a step.

    With t = `progress`, from 0 in the first epoch to 1 in the last, s = `spread` and u = `uniform_share`:

        p_i = (1 - u) g_i / sum_j g_j + u / K,    g_i = exp(-((i - t (K - 1)) / s)^2 / 2),    i = 0 .. K - 1

    so a window moves over the sizes, and a share of the steps draws any of them. A spread of 0 has the nearest size
    alone in the window (two, where they are as near).

    Raises ValueError for fewer than one size, progress or uniform_share outside 0..1, or a spread that is negative or
    not finite.
    """
    if num_sizes < 1:
        raise ValueError(f"num_sizes {num_sizes} must be at least 1")
    for name, value in (("progress", progress), ("uniform_share", uniform_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} must lie in [0, 1]")
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread {spread} must be 0 or more, in steps from one size to the next")
    distances = np.abs(np.arange(num_sizes) - progress * (num_sizes - 1))
    if spread == 0:
        window = (distances == distances.min()).astype(np.float64)
    else:
        # Relative to the nearest, so that a narrow window does not vanish.
        window = np.exp(-0.5 * ((distances / spread) ** 2 - (distances.min() / spread) ** 2))
    return (1 - uniform_share) * window / window.sum() + uniform_share / num_sizes


@dataclass(frozen=True)
class SampledSizes:
    """The sizes of every step of a run, as a pure function of (seed, epoch, step).

    sizes: px, rising. per_device_batch_sizes, global_batch_sizes: images of a batch at each size, on one device or on
        all together; give at most one. Without, the loader's own at all of them.
    final_epochs: at the run's end, which are at the last size alone. spread, uniform_share: see `size_probabilities`.

    Raises ValueError for fewer than two sizes, sizes that do not rise, as many batch sizes as there are not sizes, a
    number below 1, and what `size_probabilities` refuses.
    """

    sizes: tuple[int, ...]
    per_device_batch_sizes: tuple[int, ...] | None = None
    global_batch_sizes: tuple[int, ...] | None = None
    final_epochs: int = 0
    spread: float = 0.65
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or any(one >= other for one, other in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"sizes {list(self.sizes)} must be at least two image sizes in px, in rising order")
        lists = {"per_device_batch_sizes": self.per_device_batch_sizes, "global_batch_sizes": self.global_batch_sizes}
        if None not in lists.values():
            raise ValueError("per_device_batch_sizes and global_batch_sizes are both given; give one of them")
        for name, values in {"sizes": self.sizes, **lists}.items():
            if values is None:
                continue
            if len(values) != len(self.sizes):
                raise ValueError(
                    f"{name} has {len(values)} entries and sizes has {len(self.sizes)}; give one for each size, or "
                    "leave it out"
                )
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f"{name} {list(values)} must be whole numbers of at least 1")
        if isinstance(self.final_epochs, bool) or not isinstance(self.final_epochs, int) or self.final_epochs < 0:
            raise ValueError(f"final_epochs {self.final_epochs!r} must be a whole number of at least 0")
        size_probabilities(len(self.sizes), progress=0.0, spread=self.spread, uniform_share=self.uniform_share)

    def probabilities(self, epoch: int, total_epochs: int) -> np.ndarray:
        """float64 [K]: of each size in a step of `epoch` (counted from 0). The window reaches the last size where
        `final_epochs` begin, or in the last epoch."""
        drawn_epochs = total_epochs - self.final_epochs
        if epoch >= drawn_epochs:
            return np.eye(len(self.sizes))[-1]
        progress = epoch / (drawn_epochs - 1) if drawn_epochs > 1 else 1.0
        return size_probabilities(
            len(self.sizes), progress=progress, spread=self.spread, uniform_share=self.uniform_share
        )

    @property
    def sets_batch_size(self) -> bool:
        """Whether it has batch sizes of its own."""
        return self.per_device_batch_sizes is not None or self.global_batch_sizes is not None

    def batch_sizes(self, per_device_batch_size: int | None, num_ranks: int = 1) -> tuple[int, ...]:
        """Images per device at each size, for a loader with this batch size. Raises ValueError when global ones do not
        divide over the ranks."""
        if self.per_device_batch_sizes is not None:
            return self.per_device_batch_sizes
        if self.global_batch_sizes is not None:
            if any(size % num_ranks for size in self.global_batch_sizes):
                raise ValueError(
                    f"global_batch_sizes are {list(self.global_batch_sizes)} and there are {num_ranks} ranks; make "
                    f"them multiples of {num_ranks}"
                )
            return tuple(size // num_ranks for size in self.global_batch_sizes)
        return (per_device_batch_size or 1,) * len(self.sizes)

    def shapes(
        self,
        epoch: int,
        *,
        total_epochs: int,
        num_images: int,
        seed: int,
        per_device_batch_size: int | None = None,
        num_ranks: int = 1,
    ) -> list[Shape]:
        """The shape of every batch of `epoch` (counted from 0), the same on all ranks, which together have every image
        once.

        A drawn batch that is larger than what is left of the epoch gives way to the largest that fits; where none does,
        the last batch is of the size with the smallest batches, and not full.
        """
        batch_sizes = self.batch_sizes(per_device_batch_size, num_ranks)
        most_steps = -(-num_images // (min(batch_sizes) * num_ranks))
        drawn = self._draw(epoch, total_epochs, seed, most_steps)
        shapes, left = [], num_images
        for choice in drawn:
            if batch_sizes[choice] * num_ranks > left:
                choice = _largest_that_fits(batch_sizes, left // num_ranks)
            shapes.append((self.sizes[choice], batch_sizes[choice]))
            left -= batch_sizes[choice] * num_ranks
            if left <= 0:
                break
        return shapes

    def _draw(self, epoch: int, total_epochs: int, seed: int, steps: int) -> list[int]:
        generator = generator_at(seed, rank=0, step=epoch, stream="progressive_resizing")
        uniform = torch.rand(steps, generator=generator, dtype=torch.float64).numpy()
        # The last one rounds to less than 1 at times.
        bounds = np.cumsum(self.probabilities(epoch, total_epochs))[:-1]
        return np.searchsorted(bounds, uniform, side="right").tolist()


def _largest_that_fits(batch_sizes: Sequence[int], images: int) -> int:
    """Index of the largest batch of at most `images`, of those as large the one with the largest images; if none is,
    that of the smallest batch."""
    fitting = [index for index, size in enumerate(batch_sizes) if size <= images]
    if fitting:
        return max(fitting, key=lambda index: (batch_sizes[index], index))
    return min(range(len(batch_sizes)), key=lambda index: (batch_sizes[index], -index))
