"""Image files of any kind -> RGB pixels, or the reason why not.

Gray, palette, 16-bit and CMYK become 8-bit RGB; transparent pixels are composited over white, as on a page; EXIF
orientation is applied. Only the file's contents matter, never its name.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow reads more formats, but starts other programs for some (EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's own limit, a quarter of a GiB of RGB. A progressive JPEG takes three times that while it is decoded, on each
# thread. data/decoding/native/decode.cpp has the same number.
MOST_PIXELS = 89_478_485
# Each scan of a progressive JPEG is a pass over the whole image, and a file of some kB may have thousands. Encoders
# make 10, and 64 at most. data/decoding/native/decode.cpp has the same number.
MOST_SCANS = 100
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; some decoders read no others
_START_OF_JPEG = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"  # which the coded data cannot contain
_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


class UnusableImage(ValueError):
    """An image that cannot be decoded or stored; the message is the reason, without the file's name."""


def open_image(data: bytes) -> Image:
    """Read the header of an image file.

    Raises:
        UnusableImage: not an image, an unsupported format, or one that costs too much to decode: more than
            `MOST_PIXELS` pixels, or than `MOST_SCANS` scans.
    """
    from PIL import Image as pillow

    if not data:
        raise UnusableImage("it has no bytes")
    try:
        image = pillow.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
    except pillow.UnidentifiedImageError:
        raise UnusableImage(f"it is not an image file of these kinds: {', '.join(_FORMATS)}") from None
    except pillow.DecompressionBombError as error:  # of more than twice its limit, before it tells of the size
        raise UnusableImage(f"{error}; an image may have {MOST_PIXELS:,} pixels: make it smaller") from None
    except Exception as error:  # Pillow's readers raise all kinds of errors for damaged files
        raise UnusableImage(_reason(error)) from error
    if width * height > MOST_PIXELS:
        raise UnusableImage(f"it is of {height}x{width} px; an image may have {MOST_PIXELS:,} pixels: make it smaller")
    if data.startswith(_START_OF_JPEG) and (scans := data.count(_START_OF_SCAN)) > MOST_SCANS:
        raise UnusableImage(f"it has {scans} scans; a JPEG may have {MOST_SCANS}: save it anew")
    return image


def rgb_pixels(image: Image, *, max_side_px: int | None = None) -> np.ndarray:
    """Decode to uint8 [height, width, 3], upright, its longer side at most `max_side_px`.

    Downscaling averages the full-size image. Decoding a JPEG at 1/2 of its size would be faster, but on photographs
    with fine detail differs from the average by up to 6 of 255 levels in the mean, which the stored file keeps.

    Raises:
        UnusableImage: the file is truncated or damaged, or the range of its values is unknown.
    """
    from PIL import ImageOps

    size = fitted_size(image.size, max_side_px)
    try:
        # Turning moves whole pixels, so it is cheaper after shrinking.
        upright = ImageOps.exif_transpose(shrink(_rgb(image), size))
        return np.array(upright)
    except UnusableImage:
        raise
    except Exception as error:
        raise UnusableImage(_reason(error)) from error


def conversions(image: Image) -> list[str]:
    """The conversions to RGB that it needs besides decoding; empty for an upright RGB image of 8 bits.

    Raises:
        UnusableImage: a damaged PNG, which is decoded for this.
    """
    found = []
    if _has_alpha(image):
        found.append("alpha laid over white")
    if image.mode in ("P", "PA"):
        found.append("palette")
    elif image.mode in ("1", "L", "LA", "I", *_16_BIT_MODES):
        found.append("grey")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        found.append(image.mode)
    if image.mode in ("I", *_16_BIT_MODES):
        found.append("16 bits")
    if _orientation(image) != 1:
        found.append("EXIF orientation")
    return found


def is_plain_jpeg(image: Image, data: bytes) -> bool:
    """Whether the file can be stored as it is: upright, three channels of 8 bits, sequential or progressive.

    Reads only the header; the rest may still fail to decode.
    """
    if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
        return False
    frame = _jpeg_frame(data)
    if frame is None:
        return False
    kind, bits, height, width, channels = frame
    return kind in _PLAIN_FRAMES and (bits, channels) == (8, 3) and (width, height) == image.size


def fitted_size(size: tuple[int, int], max_side_px: int | None) -> tuple[int, int]:
    """`size`, scaled down in proportion until neither side exceeds `max_side_px`."""
    longest = max(size)
    if max_side_px is None or longest <= max_side_px:
        return size
    first, second = (max(1, side * max_side_px // longest) for side in size)
    return first, second


def shrink(image: Image, size: tuple[int, int]) -> Image:
    """`image` at (width, height) `size`, each pixel the mean of those it covers."""
    from PIL import Image as pillow

    return image if image.size == size else image.resize(size, pillow.Resampling.BOX)


def _rgb(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode in _16_BIT_MODES or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float32)
        turned = pillow.fromarray(np.round(values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        turned.info = image.info  # includes EXIF
        return turned
    if image.mode in ("I", "F"):
        raise UnusableImage(f"its pixels are of 32 bits (mode {image.mode}), whose range is not known")
    if not _has_alpha(image):
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    over_white = pillow.new("RGBA", pixels.size, (255, 255, 255, 255))
    over_white.alpha_composite(pixels)
    over_white.info = image.info
    return over_white.convert("RGB")


def _has_alpha(image: Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _orientation(image: Image) -> int:
    if image.format == "PNG":  # its EXIF may come after the pixels, which Pillow decodes then, and does not try twice
        try:
            image.load()
        except Exception as error:
            raise UnusableImage(_reason(error)) from error
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the image may be intact even if its EXIF is damaged
        return 1


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int, int] | None:
    # (kind, bits, height, width, channels) of the first frame header, by walking the segments before it.
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        kind = data[position + 1]
        if kind == 0xFF:  # a fill byte
            position += 1
        elif kind == 0x01 or 0xD0 <= kind <= 0xD7:  # segments without a length
            position += 2
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[position + at : position + at + 2], "big") for at in (5, 7))
            return kind, data[position + 4], height, width, data[position + 9]
        elif kind == 0xDA:
            return None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _reason(error: Any) -> str:
    return f"it cannot be decoded: {str(error) or type(error).__name__}"
