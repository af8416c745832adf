"""The interface of stored images, in a file or in memory, that decoders use."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np


class StoredImages(Protocol):
    """Stored images, each a JPEG or height x width x 3 bytes of RGB.

    path: of their file, for messages. heights, widths: in px [N].
    """

    path: Path
    heights: np.ndarray
    widths: np.ndarray

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """Memory address of each image's bytes: uint64 [B]."""
        ...

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        """Number of bytes of each: int64 [B]."""
        ...

    def image_bytes(self, index: int) -> np.ndarray:
        """One image's bytes: uint8 [num_bytes]."""
        ...

    def is_jpeg(self, index: int | np.ndarray) -> np.ndarray:
        """Whether each is a JPEG: bool of the shape of `index`."""
        ...

    def checksums(self, indices: np.ndarray) -> np.ndarray | None:
        """CRC-32 of each one's bytes as they were written: uint32 [B]; None where that is not known."""
        ...


def damaged_image(path: Path, index: int, reason: str) -> ValueError:
    """The error for an image whose bytes do not decode to what the file's frame says."""
    return ValueError(
        f"image {index} of {path} cannot be decoded: {reason}. The file is damaged; convert the images again"
    )
