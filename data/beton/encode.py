"""One image of a source -> the bytes that a .beton file stores of it, at one size or several.

An image is read and decoded once, whatever the number of sizes, and each size has the bytes that it would have alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..decoding.decode import Decoder, make_decoder, present_decoders
from ..decoding.native_decode import with_restart_rows
from ..draws import Operation, uniforms
from ..sources import FileSource, Source, channel_sums
from ..sources.image_file import (
    UnusableImage,
    conversions,
    fitted_size,
    is_plain_jpeg,
    open_image,
    rgb_pixels,
    shrink,
)
from .format import MAX_SIDE_PX, PAGE_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    jpeg_share: of the images, 0..1, chosen by a hash of their index; the others are stored as pixels.
    jpeg_quality: 1..100, of what is encoded.
    max_sides_px: the longer side's limit at each size; None keeps the image's own.
    sampled: the images of which channel sums are computed.
    restart_rows: JPEGs get a restart marker after each row of blocks.
    """

    jpeg_share: float
    jpeg_quality: int
    max_sides_px: tuple[int | None, ...]
    sampled: frozenset[int]
    restart_rows: bool = False


class Encoded(NamedTuple):
    """What is stored of an image at one size."""

    stored: bytes
    how: str  # "as it was", "with restarts", "jpeg" or "raw"
    height: int
    width: int


class EncodedImage(NamedTuple):
    """An image at every size, in the order of `Encoding.max_sides_px`."""

    sizes: list[Encoded]
    label: int
    converted: list[str]
    sums: np.ndarray | None  # see channel_sums; None unless the image is sampled


class LeftOut(NamedTuple):
    """An image that cannot be stored, at one of the sizes at least."""

    what: str
    reason: str
    label: int


def encode_image(source: Source, index: int, encoding: Encoding) -> EncodedImage | LeftOut:
    """Image `index` of `source` as it is stored, or why it cannot be.

    Raises:
        ValueError: its label is outside the classes, or the source does not give a uint8 image [height, width, 3].
    """
    label = source.label(index)
    if not 0 <= label < len(source.class_names):
        raise ValueError(
            f"image {index} of {source.name} cannot be stored: its label is {label}, and there are "
            f"{len(source.class_names)} classes"
        )
    drawn = uniforms(np.array([index]), seed=0, epoch=0, operation=Operation.STORAGE)[0, 0]
    as_jpeg, sample = bool(drawn < encoding.jpeg_share), index in encoding.sampled
    if isinstance(source, FileSource):
        try:
            return _encode_file(_read(source, index), label, encoding, as_jpeg=as_jpeg, sample=sample)
        except UnusableImage as error:
            return LeftOut(source.where(index), str(error), label)
    try:
        image = source.image(index)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"a uint8 array [height, width, 3] is needed, not {image.dtype} {list(image.shape)}")
        sizes = [_store(image, side, encoding, as_jpeg=as_jpeg) for side in encoding.max_sides_px]
        return EncodedImage(sizes, label, [], channel_sums(image) if sample else None)
    except UnusableImage as error:
        return LeftOut(f"image {index} of {source.name}", str(error), label)
    except Exception as error:
        raise ValueError(f"image {index} of {source.name} cannot be stored: {error}") from error


def _read(source: FileSource, index: int) -> bytes:
    try:
        return source.read(index)
    except OSError as error:
        raise UnusableImage(f"it cannot be read: {error.strerror or error}") from error


def _encode_file(data: bytes, label: int, encoding: Encoding, *, as_jpeg: bool, sample: bool) -> EncodedImage:
    image = open_image(data)
    width, height = image.size
    needed = conversions(image)
    fits = [fitted_size(image.size, side) == image.size for side in encoding.max_sides_px]
    kept = as_jpeg and any(fits) and len(data) <= PAGE_BYTES and is_plain_jpeg(image, data)
    kept = kept and _decodes_whole(image, data)
    # Statistics are of the original images, not the stored ones.
    whole = rgb_pixels(image) if sample else None

    def stored(side: int | None, fits: bool) -> Encoded:
        if kept and fits:
            return _keep(data, height, width, encoding)
        # Pillow keeps what it has decoded, so that another size costs no decoding.
        pixels = rgb_pixels(image, max_side_px=side) if whole is None else whole
        return _store(pixels, side, encoding, as_jpeg=as_jpeg)

    sizes = [stored(side, one) for side, one in zip(encoding.max_sides_px, fits, strict=True)]
    return EncodedImage(sizes, label, needed, None if whole is None else channel_sums(whole))


def _keep(data: bytes, height: int, width: int, encoding: Encoding) -> Encoded:
    stored = with_restart_rows(data) if encoding.restart_rows else data
    if stored is data or len(stored) > PAGE_BYTES:
        return Encoded(data, "as it was", height, width)
    return Encoded(stored, "with restarts", height, width)


def _store(pixels: np.ndarray, max_side_px: int | None, encoding: Encoding, *, as_jpeg: bool) -> Encoded:
    from PIL import Image as pillow

    image = pillow.fromarray(pixels)
    image = shrink(image, fitted_size(image.size, max_side_px))
    width, height = image.size
    if max(height, width) > MAX_SIDE_PX:
        raise UnusableImage(f"a side of {max(height, width)} px; the format holds {MAX_SIDE_PX}: give a max_side_px")
    if as_jpeg:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=encoding.jpeg_quality, restart_marker_rows=int(encoding.restart_rows))
        stored = buffer.getvalue()
    else:
        stored = image.tobytes()
    if len(stored) > PAGE_BYTES:
        raise UnusableImage(
            f"{height}x{width} px take {len(stored)} bytes, and a page of the file {PAGE_BYTES}: give a max_side_px, "
            "or write_mode 'jpg'"
        )
    return Encoded(stored, "jpeg" if as_jpeg else "raw", height, width)


def _decodes_whole(image: Image, data: bytes) -> bool:
    # With the loader's decoder if it is installed: it may be stricter than Pillow.
    decoder = _decoder()
    if decoder is None:
        try:
            rgb_pixels(image)
        except UnusableImage:
            return False
        return True
    width, height = image.size
    out = np.empty((1, 32, 32, 3), dtype=np.uint8)  # small, so that little is done besides reading the file's data
    whole = np.array([[0, 0, height, width, 0]], dtype=np.int32)
    try:
        decoder.decode(_OneJpeg(data, height, width), np.zeros(1, dtype=int), whole, out, exact=False)
    except ValueError:
        return False
    return True


@cache
def _decoder() -> Decoder | None:
    return make_decoder() if present_decoders() else None


class _OneJpeg:
    # A single image in memory, as StoredImages.
    path = Path("image")

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self.heights, self.widths = np.array([height]), np.array([width])

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self._bytes.ctypes.data, dtype=np.uint64)

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self._bytes.size, dtype=np.int64)

    def image_bytes(self, index: int) -> np.ndarray:
        return self._bytes

    def is_jpeg(self, index: int | np.ndarray) -> np.ndarray:
        return np.ones_like(index, dtype=bool)

    def checksums(self, indices: np.ndarray) -> None:
        return None
