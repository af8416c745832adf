"""Restart markers that the conversion adds: the same pixels, and decoding that begins near a crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.beton.encode import _OneJpeg
from data.beton.format import Beton
from data.convert import main
from data.decoding.decode import make_decoder
from data.decoding.native_decode import NativeDecoder, with_restart_rows
from data.sources.image_file import open_image

HEIGHT, WIDTH = 133, 171


def picture(**settings: object) -> bytes:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(0).normal(0, 25, (HEIGHT, WIDTH, 3))
    waves = np.stack([np.sin(rows / 9), np.cos(columns / 11), np.sin((rows + columns) / 7)], axis=2)
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(128 + 80 * waves + noise, 0, 255).astype(np.uint8))
    if settings.pop("grey", False):
        image = image.convert("L")
    image.save(buffer, format="JPEG", **({"quality": 90} | settings))
    return buffer.getvalue()


def pixels(stored: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored)))


def restarts(stored: bytes) -> int:
    """The number of restart markers in the data of the one scan."""
    data = stored[stored.index(b"\xff\xda") :]
    return sum(data.count(bytes((0xFF, 0xD0 + number))) for number in range(8))


def decoded(stored: bytes, crop: tuple[int, int, int, int], side: int) -> np.ndarray:
    out = np.zeros((1, side, side, 3), dtype=np.uint8)
    crops = np.array([[*crop, 0]], dtype=np.int32)
    NativeDecoder().decode(_OneJpeg(stored, HEIGHT, WIDTH), np.zeros(1, dtype=int), crops, out, exact=False)
    return out


@pytest.mark.parametrize(
    ("settings", "mcu_height"),
    [
        ({"subsampling": 0}, 8),
        ({"subsampling": 1}, 8),
        ({"subsampling": 2}, 16),
        ({"grey": True}, 8),
        ({"keep_rgb": True}, 8),
        ({"optimize": True, "quality": 98}, 16),
    ],
    ids=["4:4:4", "4:2:2", "4:2:0", "grey", "rgb", "codes of its own"],
)
def test_a_jpeg_with_restarts_has_the_same_pixels(settings: dict[str, object], mcu_height: int):
    stored = picture(**settings)
    made = with_restart_rows(stored)
    assert np.array_equal(pixels(made), pixels(stored))
    assert restarts(stored) == 0
    assert restarts(made) == (HEIGHT - 1) // mcu_height
    for crop in ((0, 0, HEIGHT, WIDTH), (40, 30, 60, 90), (132, 170, 1, 1)):
        assert np.array_equal(decoded(made, crop, 20), decoded(stored, crop, 20))


@pytest.mark.parametrize(
    "stored",
    [
        picture(progressive=True),
        picture(restart_marker_blocks=3),
        picture()[:-3000],
        picture()[:100],
        b"no image",
        b"",
    ],
    ids=["progressive", "has some", "cut short", "headers only", "text", "empty"],
)
def test_what_cannot_get_them_is_left_alone(stored: bytes):
    assert with_restart_rows(stored) == stored


def test_rows_above_a_crop_are_not_read():
    """The first row is cut short, which a crop that covers it notices."""
    made = with_restart_rows(picture(subsampling=0))
    expected = decoded(made, (80, 20, 40, 100), 20)
    scan = made.index(b"\xff\xda")
    damaged = made[: scan + 20] + made[made.index(b"\xff\xd0", scan) :]
    assert np.array_equal(decoded(damaged, (80, 20, 40, 100), 20), expected)
    with pytest.raises(ValueError, match="damaged or end early"):
        decoded(damaged, (0, 20, 40, 100), 20)


def test_a_conversion_with_restarts_has_the_same_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of files that are copied and of those that are encoded, for both decoders."""
    for name, data in {"copied": picture(), "progressive": picture(progressive=True)}.items():
        (tmp_path / "images" / "ant").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "ant" / f"{name}.jpg").write_bytes(data)
    open_image(picture()).save(tmp_path / "images" / "ant" / "encoded.png")
    arguments = [str(tmp_path / "images"), str(tmp_path / "plain.beton"), "--workers", "0"]
    assert main(arguments) == 0
    assert main([arguments[0], str(tmp_path / "restarts.beton"), *arguments[2:], "--restart-rows"]) == 0
    assert "1 encoded as JPEGs, 1 JPEGs given restart markers" in capsys.readouterr().out
    betons = [Beton(tmp_path / f"{name}.beton") for name in ("plain", "restarts")]
    assert [b.sidecar["written_as"].get("restart_rows", False) for b in betons] == [False, True]
    counts = [[restarts(b.image_bytes(i).tobytes()) for i in range(3)] for b in betons]
    assert counts == [[0, 0, 0], [8, 8, 0]]  # in the order of the names: copied, encoded, progressive
    crops = np.array([[30, 40, 80, 100, 0]] * 3, dtype=np.int32)
    for decoder in ("native", "libffcv"):
        outs = np.zeros((2, 3, 32, 32, 3), dtype=np.uint8)
        for beton, out in zip(betons, outs, strict=True):
            make_decoder(decoder).decode(beton, np.arange(3), crops, out, exact=True)
        assert np.array_equal(outs[0], outs[1])
