"""A .beton file and its copies at smaller image sizes, its tiers: which of them a pass over the data reads.

A stage of 128 px needs few of the pixels of a file of 500 px, and most of what a JPEG costs to decode is in proportion
to its bytes. All tiers hold the same images in the same order, so a position in the data means the same in each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..decoding.crops import CropSettings
from .format import Beton, convert_command, tier_path

# Of a tier's shorter side over the image size. At 1.5, each crop of at least 0.33 of the area of an image of 4:3 still
# has as many pixels as are asked for; recipes for 128 px crop 0.25 or 0.35 at least.
DEFAULT_HEADROOM = 1.5


class Tiers:
    """Opens a .beton file and the tiers that its sidecar names. A file without any is its own only tier.

    Args:
        path: of the file with the largest images; the others are at `tier_path(path, size)`.
        headroom: a tier's shorter side over the image size that a training pass needs, at least 1. None is 1.5, or
            1 / `crop_ratio` where that sets the crop.

    Attributes:
        largest: the file at `path`, from which labels and all else but pixels are taken.

    Raises:
        FileNotFoundError: no such file, or a tier of it is missing.
        ValueError: a damaged file; a tier that was not written with it; a headroom below 1.
    """

    def __init__(self, path: str | Path, *, headroom: float | None = None) -> None:
        if headroom is not None and not headroom >= 1:
            raise ValueError(f"tier headroom {headroom}: give a number of at least 1")
        self.largest = Beton(path)
        self._headroom = headroom
        checksums = {int(size): checksum for size, checksum in self.largest.sidecar.get("tiers", {}).items()}
        self._smaller = [_open_tier(self.largest, size, checksums) for size in sorted(checksums)]

    def serving(self, image_size: int, crops: CropSettings, *, augment: bool) -> Beton:
        """The smallest tier that serves a pass at `image_size` px, the largest if no other does.

        In training (`augment`), it serves if the shorter side of its median image is at least headroom x `image_size`.
        In evaluation, if the crop of each of its images has at least `image_size` px on its side, or is of an image
        that no tier has larger: no crop loses pixels that the result can show.
        """

        def serves(tier: Beton) -> bool:
            if augment:
                return image_size <= self._most_training_px(tier, crops)
            return self._serves_evaluation(tier, image_size, crops)

        return next((tier for tier in self._smaller if serves(tier)), self.largest)

    @property
    def all(self) -> list[Beton]:
        """Every file, smallest images first."""
        return [*self._smaller, self.largest]

    def training_limits(self, crops: CropSettings) -> list[tuple[Path, int]]:
        """Each smaller file, smallest first, and the largest image size in px at which it serves training."""
        return [(tier.path, self._most_training_px(tier, crops)) for tier in self._smaller]

    def _most_training_px(self, tier: Beton, crops: CropSettings) -> int:
        headroom = self._headroom
        if headroom is None:
            headroom = DEFAULT_HEADROOM if crops.crop_ratio is None else 1 / crops.crop_ratio
        return int(np.median(np.minimum(tier.heights, tier.widths)) / headroom)

    def _serves_evaluation(self, tier: Beton, image_size: int, crops: CropSettings) -> bool:
        shorter = np.minimum(tier.heights, tier.widths)
        as_large = shorter == np.minimum(self.largest.heights, self.largest.widths)
        return bool((as_large | (np.round(crops.eval_crop_ratio * shorter) >= image_size)).all())


def _open_tier(largest: Beton, size: int, checksums: dict[int, int]) -> Beton:
    path = tier_path(largest.path, size)
    sizes = ",".join(map(str, [*sorted(checksums), largest.sidecar["written_as"]["max_side_px"]]))
    command = f"{convert_command(largest.path)} --sizes {sizes}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{largest.path} has a tier of {size} px, and there is no file {path}: copy it there, or write all sizes "
            f"anew: {command}"
        )
    tier = Beton(path)
    if tier.sidecar.get("images_checksum") != checksums[size] or not np.array_equal(tier.labels, largest.labels):
        raise ValueError(
            f"{path} is not the tier of {size} px with which {largest.path} was written: copy both from one place, or "
            f"write all sizes anew: {command}"
        )
    return tier
