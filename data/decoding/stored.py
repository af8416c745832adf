"""What a decoder asks of the file, or of the memory, that its images are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np


class StoredImages(Protocol):
    """Images as they are stored, each a JPEG or height x width x 3 bytes of RGB.

    path: of the file that they are in, for messages. heights, widths: in px [N].
    """

    path: Path
    heights: np.ndarray
    widths: np.ndarray

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """Where in memory each image's bytes begin: uint64 [B]."""
        ...

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        """How many there are of each: int64 [B]."""
        ...

    def image_bytes(self, index: int) -> np.ndarray:
        """One image's bytes: uint8 [num_bytes]."""
        ...

    def is_jpeg(self, index: int | np.ndarray) -> np.ndarray:
        """Whether they are a JPEG: bool of the shape of `index`."""
        ...


def damaged_image(path: Path, index: int, reason: str) -> ValueError:
    """The error for an image that is not what the file's frame says, found when it is decoded."""
    return ValueError(
        f"image {index} of {path} cannot be decoded: {reason}. The file is damaged; convert the images again"
    )
