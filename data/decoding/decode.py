"""Selects a decoder for stored images."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .libffcv_decode import LibffcvDecoder, find_libffcv
from .native_decode import NativeDecoder, find_native
from .stored import StoredImages


class Decoder(Protocol):
    """Decodes the crops of a batch. Releases the GIL, so threads suffice to use all cores."""

    name: str

    def decode(
        self, images: StoredImages, indices: np.ndarray, crops: np.ndarray, out: np.ndarray, *, exact: bool
    ) -> None:
        """Decode images, cut `crops` out of them, and write them to `out` at its size.

        Args:
            indices: of the images [B].
            crops: int32 [B, 5]: top, left, height, width in px of the whole image, and 1 for a left-right flip.
            out: uint8 [B, S, S, 3], contiguous.
            exact: False may decode a JPEG that is much larger than needed at 1/2, 1/4 or 1/8 of its size, which
                averages blocks of pixels nearly as the resizing would.

        Raises:
            ValueError: stored bytes are not a complete image of the size given in the file.
        """
        ...


DECODERS = {"native": NativeDecoder, "libffcv": LibffcvDecoder}


def present_decoders() -> list[str]:
    """The names of the installed decoders, best first. Loads nothing."""
    found = {"native": find_native(), "libffcv": find_libffcv()}
    return [name for name, path in found.items() if path is not None]


def make_decoder(name: str = "auto") -> Decoder:
    """The decoder of this name; "auto" is the best one installed.

    Raises:
        ValueError: no such name.
        ModuleNotFoundError: it is not installed, or none is; the message says what to do.
    """
    if name != "auto" and name not in DECODERS:
        raise ValueError(f"decoder {name!r}: give auto or one of {', '.join(DECODERS)}")
    if name == "auto":
        name = next(iter(present_decoders()), "native")
    return DECODERS[name]()
