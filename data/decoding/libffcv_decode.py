"""Stored bytes -> square crops of a batch, by FFCV's C library: the fallback where ours was not built.

The library is loaded directly: importing the `ffcv` package would also import numba and compile for seconds.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np

from .stored import StoredImages, damaged_image

_INTER_AREA = 3  # OpenCV's number; libffcv 1.0 always uses it and ignores the argument, later versions read it
_JPEG_DENOMINATORS = (8, 4, 2)  # the reductions for which libjpeg-turbo has vectorized transforms
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the others are tables

_scratch = threading.local()


def find_libffcv() -> Path | None:
    """Path of FFCV's compiled library, or None if FFCV is not installed. Imports nothing."""
    spec = find_spec("ffcv")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("_libffcv*.so")):
            return found
    return None


class LibffcvDecoder:
    """Decodes with FFCV's library: the whole JPEG, at a reduced size if that suffices, then the crop.

    Raises:
        ModuleNotFoundError: FFCV is not installed or does not load; the message says what to do.
    """

    name = "libffcv"

    def __init__(self) -> None:
        _library()
        _opencv()

    def decode(
        self, images: StoredImages, indices: np.ndarray, crops: np.ndarray, out: np.ndarray, *, exact: bool
    ) -> None:
        """See `data.decoding.decode.Decoder`. A reduced JPEG's crop is off by up to half a pixel of the result."""
        _check_sums(images, indices)
        for destination, index, crop in zip(out, indices.tolist(), crops.tolist(), strict=True):
            _decode_image(images, index, crop, destination, exact=exact)


def _decode_image(images: StoredImages, index: int, crop: list[int], destination: np.ndarray, *, exact: bool) -> None:
    top, left, crop_height, crop_width, flip = crop
    height, width = int(images.heights[index]), int(images.widths[index])
    stored = images.image_bytes(index)
    size = destination.shape[0]
    if images.is_jpeg(index):
        _check_header(images, index, stored)  # libffcv believes the height and width that it is given
        denominator = 1 if exact else _jpeg_denominator(crop_height, crop_width, size)
        pixels = _decode_jpeg(stored, height, width, denominator)
        if pixels is None:
            raise damaged_image(images.path, index, f"it is not a whole JPEG of {height}x{width} px")
        if denominator > 1:
            height, width = pixels.shape[:2]
            top, crop_height = _scaled(top, crop_height, denominator, height)
            left, crop_width = _scaled(left, crop_width, denominator, width)
    else:
        pixels = stored.reshape(height, width, 3)
    if crop_height >= size and crop_width >= size:
        _library().resize(
            *(0, pixels.ctypes.data, height, width),
            *(top, top + crop_height, left, left + crop_width),
            *(destination.ctypes.data, size, size, _INTER_AREA),
        )
    else:
        # libffcv's area interpolation repeats pixels when it enlarges; torchvision interpolates bilinearly.
        cut = pixels[top : top + crop_height, left : left + crop_width]
        cv2 = _opencv()
        cv2.resize(cut, (size, size), dst=destination, interpolation=cv2.INTER_LINEAR)
    if flip:
        destination[:] = destination[:, ::-1].copy()


def _check_sums(images: StoredImages, indices: np.ndarray) -> None:
    checksums = images.checksums(indices)
    if checksums is None:
        return
    for index, checksum in zip(indices.tolist(), checksums.tolist(), strict=True):
        if zlib.crc32(images.image_bytes(index).data) != checksum:
            raise damaged_image(images.path, index, "its bytes are not those that were written, by their checksum")


def _check_header(images: StoredImages, index: int, stored: np.ndarray) -> None:
    height, width = int(images.heights[index]), int(images.widths[index])
    if _jpeg_size(memoryview(stored.data)) != (height, width):
        raise damaged_image(images.path, index, f"it is not a whole JPEG of {height}x{width} px")


def _jpeg_size(stored: memoryview) -> tuple[int, int] | None:
    """Height and width in px from the frame header of a JPEG; None if there is none."""
    place = 2  # after the start of the image
    while place + 9 <= len(stored) and stored[place] == 0xFF:
        marker = stored[place + 1]
        if marker in _FRAME_HEADERS:
            height, width = stored[place + 5 : place + 7], stored[place + 7 : place + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these stand alone
            place += 2
        else:
            place += 2 + int.from_bytes(stored[place + 2 : place + 4], "big")
    return None


def _jpeg_denominator(crop_height: int, crop_width: int, size: int) -> int:
    shorter = min(crop_height, crop_width)
    return next((d for d in _JPEG_DENOMINATORS if shorter // d >= size), 1)


def _scaled(start: int, length: int, denominator: int, limit: int) -> tuple[int, int]:
    length = min(round(length / denominator), limit)
    return min(round(start / denominator), limit - length), length


def _decode_jpeg(stored: np.ndarray, height: int, width: int, denominator: int) -> np.ndarray | None:
    scaled_height, scaled_width = -(-height // denominator), -(-width // denominator)
    pixels = _scratch_pixels(scaled_height, scaled_width)
    status = _library().imdecode(
        *(stored.ctypes.data, stored.size, height, width, pixels.ctypes.data),
        *(height, width, 0, 0, 1, denominator, False, False),
    )
    return pixels if status == 0 else None


def _scratch_pixels(height: int, width: int) -> np.ndarray:
    # One buffer per thread, as large as its largest image so far.
    needed = height * width * 3
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < needed:
        buffer = _scratch.buffer = np.empty(needed, dtype=np.uint8)
    return buffer[:needed].reshape(height, width, 3)


@cache
def _library() -> ctypes.CDLL:
    path = find_libffcv()
    if path is None:
        raise ModuleNotFoundError(
            "the FFCV loader needs FFCV, which is not installed: pip install 'brisk-vision[ffcv]' (see "
            "docs/installation.md), or use the loader 'torch'",
            name="ffcv",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ModuleNotFoundError(
            f"FFCV's library {path} does not load ({error}): install OpenCV and libturbojpeg as docs/installation.md "
            "says, or use the loader 'torch'",
            name="ffcv",
        ) from error
    library.resize.argtypes = [ctypes.c_int64] * 12
    library.resize.restype = None
    library.imdecode.argtypes = (
        [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p]
        + [ctypes.c_uint32] * 6
        + [ctypes.c_bool] * 2
    )
    library.imdecode.restype = ctypes.c_int
    return library


@cache
def _opencv() -> ModuleType:
    import cv2  # comes with FFCV, which requires it

    return cv2
