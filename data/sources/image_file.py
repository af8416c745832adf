"""Image files of any kind -> RGB pixels, or the reason why not.

Grey, palette, 16-bit and CMYK become 8-bit RGB; transparent pixels are laid over white, as a page shows them; EXIF
orientation is applied. Everything is told by the file's contents, never by its name.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow reads more, and for some (EPS) it starts other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; the others are not read everywhere
_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


class UnusableImage(ValueError):
    """An image that cannot become pixels, or cannot be stored; the text is the reason, without the file's name."""


def open_image(data: bytes) -> Image:
    """Read the header of an image file.

    Raises:
        UnusableImage: no image, of a kind that is not read, or one whose pixels would take more memory than Pillow
            deems safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    from PIL import Image as pillow

    if not data:
        raise UnusableImage("it has no bytes")
    try:
        image = pillow.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
    except pillow.UnidentifiedImageError:
        raise UnusableImage(f"it is not an image file of these kinds: {', '.join(_FORMATS)}") from None
    except Exception as error:  # Pillow's readers let all kinds escape for files that are damaged
        raise UnusableImage(_reason(error)) from error
    if width * height > (pillow.MAX_IMAGE_PIXELS or width * height):
        raise UnusableImage(f"{height}x{width} px are more than {pillow.MAX_IMAGE_PIXELS} pixels")
    return image


def rgb_pixels(image: Image, *, max_side_px: int | None = None) -> np.ndarray:
    """Decode to uint8 [height, width, 3], upright, its longer side at most `max_side_px`.

    Smaller images are averages of whole ones: decoding a JPEG at 1/2 of its size would be faster, and differs from the
    average by up to 6 levels of 255 in the mean on photographs with fine detail, for as long as the file is used.

    Raises:
        UnusableImage: the file is cut short or damaged, or its values have no known range.
    """
    from PIL import ImageOps

    size = fitted_size(image.size, max_side_px)
    try:
        # Turning moves whole pixels, so it can wait until there are fewer.
        upright = ImageOps.exif_transpose(shrink(_rgb(image), size))
        return np.array(upright)
    except UnusableImage:
        raise
    except Exception as error:
        raise UnusableImage(_reason(error)) from error


def conversions(image: Image) -> list[str]:
    """What has to be done to make RGB of it, beside decoding; empty for an upright RGB image of 8 bits."""
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
    """Whether the file itself can stand for the image: upright, three channels of 8 bits, baseline or progressive.

    Looks at the header alone; whether the rest decodes is another question.
    """
    if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
        return False
    frame = _jpeg_frame(data)
    if frame is None:
        return False
    kind, bits, height, width, channels = frame
    return kind in _PLAIN_FRAMES and (bits, channels) == (8, 3) and (width, height) == image.size


def fitted_size(size: tuple[int, int], max_side_px: int | None) -> tuple[int, int]:
    """`size`, made smaller in proportion until neither side is longer than `max_side_px`."""
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
        turned.info = image.info  # EXIF is in it
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
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing, and the picture may still be whole
        return 1


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int, int] | None:
    # (kind, bits, height, width, channels) of the first frame header, by walking the segments in front of it.
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
