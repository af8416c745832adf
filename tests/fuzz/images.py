"""Image files of any kind, in every place that reads one: images.py EXAMPLES FOLDER."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bounds import arguments, limited_seconds, run
from hostile import huge_jpeg, huge_png, many_scans
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import Beton, read_image, write_beton
from data.beton.format import report_path
from data.inspect import verify
from data.sources import folder as folder_source
from training.exporting.page import Classifier, look_at, read_picture

OUTCOMES: Counter[str] = Counter()
CLASSIFIER = Classifier(
    "any",
    ("a", "b"),
    8,
    0.875,
    (0.0,) * 3,
    (255.0,) * 3,
    lambda images: images.reshape(len(images), 2, -1).mean(axis=2),
)

# What is small, and large once it is decoded, or no image that is read.
BOMBS: dict[str, Callable[[], bytes]] = {
    "16,384 px a side": lambda: huge_jpeg(16_384, progressive=True),
    "65,500 px a side": lambda: huge_jpeg(65_500),
    "PNG of 20,000 px a side": lambda: huge_png(20_000),
    "PNG just over the limit": lambda: huge_png(9_460),
    "101 scans": lambda: many_scans(101),
    "883 scans": lambda: many_scans(883),
    "SVG": lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "nothing": lambda: b"",
}


def seeds() -> dict[str, bytes]:
    """A file of each kind that is read."""
    random = np.random.default_rng(0)
    color = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(random.integers(0, 65_536, (24, 20), dtype=np.uint16))
    palette = color.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (color, "JPEG", {}),
        "jpeg, progressive": (color, "JPEG", {"progressive": True}),
        "jpeg, CMYK": (color.convert("CMYK"), "JPEG", {}),
        "jpeg, gray": (color.convert("L"), "JPEG", {}),
        "jpeg, turned": (color, "JPEG", {"exif": turned}),
        "png": (color, "PNG", {}),
        "png, alpha": (color.convert("RGBA"), "PNG", {}),
        "png, 16 bits": (deep, "PNG", {}),
        "png, palette": (palette, "PNG", {"transparency": 3}),
        "png, one bit": (color.convert("1"), "PNG", {}),
        "gif, animated": (palette, "GIF", {"save_all": True, "append_images": [palette] * 3, "transparency": 1}),
        "bmp": (color, "BMP", {}),
        "ppm": (color, "PPM", {}),
        "tiff": (color, "TIFF", {}),
        "tiff, LZW": (color, "TIFF", {"compression": "tiff_lzw"}),
        "tiff, JPEG": (color, "TIFF", {"compression": "jpeg"}),
        "webp": (color, "WEBP", {}),
        "webp, lossless": (color.convert("RGBA"), "WEBP", {"lossless": True}),
    }
    return {name: _saved(*kind) for name, kind in kinds.items()}


def _saved(image: Image.Image, kind: str, settings: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def judge(content: bytes) -> None:
    """Read it in every place. Raises AssertionError where the places disagree, or one raises what is no reason."""
    path = Path("picture")
    path.write_bytes(content)
    found = {}
    places: dict[str, Callable[[], np.ndarray]] = {
        "predict.py": lambda: read_image(content),
        "the page": lambda: read_picture(path),
        "a folder": lambda: folder_source(".").image(0),
    }
    Path("class", "image.png").write_bytes(content)
    for place, read in places.items():
        try:
            with limited_seconds():
                pixels = read()
        except (ValueError, OSError) as error:
            if not str(error) or "\n" in str(error):
                raise AssertionError(f"{place}: no line: {error!r}") from error
            found[place] = "a reason why not"
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        found[place] = "pixels"
    assert len(set(found.values())) == 1, found
    OUTCOMES[found["the page"]] += 1
    if found["the page"] == "pixels":
        with limited_seconds():
            look_at(read_picture(path), CLASSIFIER)
    _convert(found["the page"] == "pixels")


def _convert(readable: bool) -> None:
    """Beside a good image; one that is left out is in the report."""
    out = Path("out.beton")
    with limited_seconds():
        write_beton(folder_source("."), out, write_mode="jpg", strict=False, progress=False, num_workers=0)
        beton = Beton(out)
        verify(beton, num_workers=0)
    assert len(beton) == 1 + readable, "converted, and not readable, or the other way round"
    assert report_path(out).exists() != readable
    OUTCOMES["converted" if readable else "left out of the conversion"] += 1


def mutants(whole: dict[str, bytes]) -> st.SearchStrategy[bytes]:
    """A seed with bytes changed, cut or put in, most near its beginning, where sizes and kinds are."""
    edit = st.tuples(st.floats(0, 1), st.booleans(), st.binary(max_size=6), st.integers(0, 6))

    def changed(given_seed: bytes, edits: list[tuple[float, bool, bytes, int]]) -> bytes:
        content = bytearray(given_seed)
        for place, early, piece, length in edits:
            at = int(place * (min(100, len(content)) if early else len(content)))
            content[at : at + length] = piece
        return bytes(content)

    made = st.builds(changed, st.sampled_from(sorted(whole.values())), st.lists(edit, min_size=1, max_size=3))
    cut = st.builds(
        lambda one, share: one[: int(len(one) * share)], st.sampled_from(sorted(whole.values())), st.floats(0, 1)
    )
    return made | cut | st.binary(max_size=64)


if __name__ == "__main__":
    count, (room,) = arguments()
    os.chdir(room)
    Path("class").mkdir()
    good = seeds()
    Path("class", "zz_good.png").write_bytes(good["png"])
    for name, content in good.items():
        judge(content)
        assert OUTCOMES.pop("pixels", 0), name
    for name, content in BOMBS.items():
        judge(content())
        assert not OUTCOMES["pixels"], name
    OUTCOMES.clear()
    run(count, judge, given(mutants(good)), OUTCOMES)
