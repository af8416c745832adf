"""The decoders: against an independent resize in float64, against each other, and against damaged images."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import many_scans
from PIL import Image
from torchvision.transforms.v2 import functional

from data.beton.format import Beton
from data.beton.write import write_beton
from data.decoding.crops import center_crops, random_resized_crops
from data.decoding.decode import Decoder, make_decoder
from data.decoding.native_decode import NativeDecoder
from data.sources import ArraySource
from data.sources.image_file import MOST_PIXELS, MOST_SCANS

pytestmark = pytest.mark.timeout(120)
NATIVE = Path(__file__).parents[3] / "data" / "decoding" / "native"


def real_photos() -> list[np.ndarray]:
    """Two real photographs of 427x640 px."""
    return list(pytest.importorskip("sklearn.datasets").load_sample_images().images)


def jpeg(image: np.ndarray, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", **({"quality": 90} | settings))
    return buffer.getvalue()


class Stored:
    """What a decoder asks of a Beton, for bytes of a test's own."""

    def __init__(self, images: list[bytes | np.ndarray], sizes: list[tuple[int, int]] | None = None) -> None:
        self.path = Path("stored.beton")
        self.sums: np.ndarray | None = None
        self._is_jpeg = np.array([isinstance(image, bytes) for image in images])
        self._bytes = [
            np.frombuffer(i, dtype=np.uint8).copy() if isinstance(i, bytes) else np.ascontiguousarray(i).reshape(-1)
            for i in images
        ]
        sizes = sizes or [Image.open(io.BytesIO(i)).size[::-1] if isinstance(i, bytes) else i.shape[:2] for i in images]
        self.heights, self.widths = (np.array(side, dtype=np.int64) for side in zip(*sizes, strict=True))

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self._bytes[i].ctypes.data for i in indices], dtype=np.uint64)

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self._bytes[i].size for i in indices], dtype=np.int64)

    def image_bytes(self, index: int) -> np.ndarray:
        return self._bytes[index]

    def is_jpeg(self, index: Any) -> Any:
        return self._is_jpeg[index]

    def checksums(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.sums is None else self.sums[indices]

    def decode(self, decoder: Decoder, crops: Any, *, side: int, exact: bool = True) -> np.ndarray:
        out = np.full((len(crops), side, side, 3), 77, dtype=np.uint8)
        decoder.decode(self, np.arange(len(crops)), np.asarray(crops, dtype=np.int32), out, exact=exact)  # pyright: ignore
        return out


def weights(length: int, side: int) -> np.ndarray:
    """float64 [side, length]: areas where it shrinks, bilinear interpolation of centers where it enlarges."""
    matrix = np.zeros((side, length))
    ratio = length / side
    for i in range(side):
        if ratio >= 1:
            edges = np.clip(np.arange(length + 1), i * ratio, (i + 1) * ratio)
            matrix[i] = np.diff(edges) / ratio
        else:
            center = min(max((i + 0.5) * ratio - 0.5, 0), length - 1)
            matrix[i] = np.clip(1 - np.abs(np.arange(length) - center), 0, 1)
    return matrix


def resized(image: np.ndarray, crop: Any, side: int) -> np.ndarray:
    """float64 [side, side, 3]: the crop resized by matrices."""
    top, left, height, width, flip = (int(v) for v in crop)
    cut = image[top : top + height, left : left + width].astype(np.float64)
    out = np.einsum("yh,hwc,xw->yxc", weights(height, side), cut, weights(width, side), optimize=True)
    return out[:, ::-1] if flip else out


def some_crops(num: int, height: int, width: int) -> np.ndarray:
    every = np.arange(num)
    return random_resized_crops(every, np.full(num, height), np.full(num, width), seed=3, epoch=1, scale=(0.05, 1.0))


@pytest.mark.parametrize("side", [1, 2, 7, 16, 33, 64, 224])
def test_pixels_are_those_of_a_resize_in_float64(side: int):
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    crops = some_crops(24, 97, 131)
    out = Stored([image] * 24).decode(NativeDecoder(), crops, side=side)
    differences = np.stack([np.abs(mine - resized(image, crop, side)) for mine, crop in zip(out, crops, strict=True)])
    # Rounding alone is 0.25 on average and 0.5 at most. Weights of 7 bits add up to 1/256 of the contrast between
    # neighbours, which noise makes as large as it gets.
    assert differences.mean() < 0.4
    assert differences.max() < 2.5


def test_a_constant_image_stays_what_it_is():
    for value in (0, 1, 127, 254, 255):
        image = np.full((300, 211, 3), value, dtype=np.uint8)
        for side in (3, 64, 200, 224, 400):
            out = Stored([image] * 8).decode(NativeDecoder(), some_crops(8, 300, 211), side=side)
            assert (out == value).all()


def test_jpegs_are_decoded_in_full_where_it_shall_be_exact():
    for image in real_photos():
        for settings in ({}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 50}):
            stored = jpeg(image, **settings)
            decoded = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
            crops = [*some_crops(6, 427, 640), *center_crops(np.array([427]), np.array([640]), crop_ratio=0.875)]
            out = Stored([stored] * 7).decode(NativeDecoder(), crops, side=160)
            for mine, crop in zip(out, crops, strict=True):
                difference = np.abs(mine - resized(decoded, crop, 160))
                assert difference.mean() < 0.35
                # A column more or less beside the crop would show in the colors at its edge.
                assert max(difference[:, 0].mean(), difference[:, -1].mean(), difference[0].mean()) < 0.5


@pytest.mark.parametrize("side", [96, 128, 176])
def test_a_reduced_jpeg_is_within_two_levels(side: int):
    means, shifted = [], []
    for image in real_photos():
        stored = jpeg(image)
        decoded = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        every = np.full(24, 1)
        crops = random_resized_crops(np.arange(24), every * 427, every * 640, seed=0, epoch=0, scale=(0.35, 1.0))
        out = Stored([stored] * 24).decode(NativeDecoder(), crops, side=side, exact=False)
        for mine, crop in zip(out, crops, strict=True):
            full = resized(decoded, crop, side)
            means.append(np.abs(mine - full).mean())
            shifted.append(np.abs(np.roll(mine, 1, axis=1) - full)[:, 1:].mean())
    assert np.mean(means) < 2
    # That is far from what a displacement by one pixel of the result makes.
    assert np.mean(means) < 0.5 * np.mean(shifted)


def test_a_reduced_crop_keeps_its_place():
    # A step at column 321: the crop begins at an odd column, so that at half size it begins within a pixel.
    image = np.zeros((256, 640, 3), dtype=np.uint8)
    image[:, 321:] = 255
    stored = jpeg(image, quality=100, subsampling=0)
    for left in (193, 194, 195):
        (out,) = Stored([stored]).decode(NativeDecoder(), [(0, left, 256, 256, 0)], side=64, exact=False)
        edge = (255 - out.astype(float).mean(axis=(0, 2))).sum() / 255 * 4 + left
        assert edge == pytest.approx(321, abs=0.2)


def test_grey_jpegs_become_rgb():
    grey = real_photos()[0].mean(axis=2).astype(np.uint8)
    stored = jpeg(grey)
    (out,) = Stored([stored]).decode(NativeDecoder(), [(0, 0, 427, 427, 0)], side=100)
    assert np.array_equal(out[..., 0], out[..., 1])
    decoded = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
    assert np.abs(out - resized(decoded, (0, 0, 427, 427, 0), 100)).mean() < 0.4


def test_plain_code_gives_the_same_bits():
    stored = Stored([*(jpeg(p) for p in real_photos()), *real_photos()] * 8)
    crops = some_crops(32, 427, 640)
    for side in (1, 2, 3, 5, 50, 127, 128, 224, 500):
        for exact in (True, False):
            fast = stored.decode(NativeDecoder(), crops, side=side, exact=exact)
            assert np.array_equal(fast, stored.decode(NativeDecoder(plain=True), crops, side=side, exact=exact))


def noisy(height: int, width: int) -> np.ndarray:
    """A photo's part with noise, so that codes of all lengths occur."""
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return np.clip(real_photos()[1][:height, :width] + noise, 0, 255).astype(np.uint8)


def resampled(stored: bytes, sampling: int, height: int, width: int) -> bytes:
    """A JPEG with another sampling of its luma and another size in its frame header, and as many blocks as before."""
    at = stored.index(b"\xff\xc0")
    frame = bytearray(stored[at : at + 12])
    frame[5:9], frame[11] = height.to_bytes(2, "big") + width.to_bytes(2, "big"), sampling
    return stored[:at] + bytes(frame) + stored[at + 12 :]


KINDS: dict[str, Callable[[], bytes]] = {
    "4:4:4": lambda: jpeg(noisy(133, 171), subsampling=0),
    "4:2:2": lambda: jpeg(noisy(133, 171), subsampling=1),
    "4:2:0": lambda: jpeg(noisy(133, 171), subsampling=2),
    "4:4:0": lambda: resampled(jpeg(noisy(133, 171), subsampling=1), 0x12, 171, 133),
    "4:1:1": lambda: resampled(jpeg(noisy(133, 171), subsampling=2), 0x41, 8 * 9 - 3, 32 * 11 - 5),
    "grey": lambda: jpeg(noisy(133, 171)[..., 0]),
    "whole MCUs": lambda: jpeg(noisy(128, 160)),
    "one MCU": lambda: jpeg(noisy(7, 9)),
    "codes of its own": lambda: jpeg(noisy(133, 171), optimize=True, quality=98),
    "restarts in rows": lambda: jpeg(noisy(133, 171), restart_marker_blocks=3),
    "a restart a row": lambda: jpeg(noisy(133, 171), restart_marker_rows=1, subsampling=1),
    "coarse": lambda: jpeg(noisy(133, 171), quality=5),
    "progressive": lambda: jpeg(noisy(133, 171), progressive=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_our_entropy_decoding_gives_libjpegs_pixels(kind: str):
    """For crops at every border and at every place within a block, at full size and at each reduction."""
    stored = KINDS[kind]()
    width, height = Image.open(io.BytesIO(stored)).size
    random = np.random.default_rng(5)
    borders = [
        (top, left, tall, wide, 0)
        for tall in {1, height // 3 + 1, height}
        for wide in {1, width // 3 + 1, width}
        for top in {0, (height - tall) // 2, height - tall}
        for left in {0, (width - wide) // 2, width - wide}
    ]
    tops, lefts = random.integers(0, height, 40), random.integers(0, width, 40)
    inside = [
        (y, x, random.integers(1, height - y + 1), random.integers(1, width - x + 1), 1)
        for y, x in zip(tops, lefts, strict=True)
    ]
    crops = borders + inside
    images = Stored([stored] * len(crops))
    for side, exact in ((24, True), (1, False), (4, False), (12, False), (33, False)):
        ours, libjpegs = (images.decode(NativeDecoder(plain=p), crops, side=side, exact=exact) for p in (False, True))
        assert np.array_equal(ours, libjpegs)


def test_data_that_end_early_are_an_error_only_where_the_crop_needs_them():
    whole = jpeg(noisy(133, 171), subsampling=0)
    cut = Stored([whole[: len(whole) * 3 // 4]], sizes=[(133, 171)])
    expected = Stored([whole]).decode(NativeDecoder(), [(0, 0, 60, 171, 0)], side=20)
    assert np.array_equal(cut.decode(NativeDecoder(), [(0, 0, 60, 171, 0)], side=20), expected)
    for crop in ((0, 0, 133, 10, 0), (120, 0, 1, 1, 0)):
        with pytest.raises(ValueError, match="its data are damaged or end early"):
            cut.decode(NativeDecoder(), [crop], side=20)


@pytest.mark.parametrize("marker", [0xD1, 0xD5, 0xD9, 0xFE])
def test_a_restart_marker_that_is_another_one_is_an_error(marker: int):
    whole = jpeg(noisy(133, 171), restart_marker_blocks=3)
    at = whole.index(b"\xff\xd0", whole.index(b"\xff\xda"))
    stored = Stored([whole[:at] + bytes((0xFF, marker)) + whole[at + 2 :]])
    for plain in (False, True):
        with pytest.raises(ValueError, match=r"damaged or end early|Corrupt JPEG data"):
            stored.decode(NativeDecoder(plain=plain), [(0, 0, 133, 171, 0)], side=20)


def test_enlarging_is_torchvisions_bilinear():
    image = real_photos()[0]
    crop = (100, 50, 60, 71, 1)
    (out,) = Stored([image]).decode(NativeDecoder(), [crop], side=224)
    theirs = functional.resized_crop(
        torch.from_numpy(image.copy()).permute(2, 0, 1), *crop[:4], [224, 224], antialias=True
    )
    difference = np.abs(out[:, ::-1].astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))
    assert difference.mean() < 0.3
    assert difference.max() <= 2


def test_both_decoders_agree():
    stored = Stored([jpeg(p, subsampling=0) for p in real_photos()] * 5)
    crops = some_crops(10, 427, 640)
    for side in (64, 224):
        outs = [stored.decode(make_decoder(name), crops, side=side) for name in ("native", "libffcv")]
        assert np.abs(outs[0].astype(int) - outs[1].astype(int)).mean() < 1.5


# --- damage ----------------------------------------------------------------------------------------------------------

WHOLE: Callable[[], bytes] = lambda: jpeg(np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8))  # noqa: E731


@pytest.mark.parametrize("name", ["native", "libffcv"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"\xff\xd8\xff",
        lambda whole: b"no image at all" * 10,
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:200],
        lambda whole: bytes(len(whole)),
    ],
    ids=["empty", "two markers", "text", "half", "header only", "zeros"],
)
def test_damaged_jpegs_are_errors(name: str, damage: Callable[[bytes], bytes]):
    stored = Stored([WHOLE(), damage(WHOLE())], sizes=[(64, 48)] * 2)
    with pytest.raises(ValueError, match=r"image 1 of stored\.beton cannot be decoded: .*convert the images again"):
        stored.decode(make_decoder(name), [(0, 0, 64, 48, 0)] * 2, side=16)


@pytest.mark.parametrize(
    ("image", "size", "crop", "message"),
    [
        (WHOLE, (64, 49), (0, 0, 64, 48, 0), "of another size than the file says"),
        (WHOLE, (64, 48), (0, 1, 64, 48, 0), "crop does not lie within it"),
        (WHOLE, (64, 48), (-1, 0, 64, 48, 0), "crop does not lie within it"),
        (WHOLE, (64, 48), (0, 0, 0, 48, 0), "crop does not lie within it"),
        (lambda: np.zeros((5, 5, 3), np.uint8), (5, 6), (0, 0, 5, 5, 0), "bytes are not as many as its pixels need"),
        (WHOLE, (1 << 20, 1 << 20), (0, 0, 64, 48, 0), "size is outside of what is decoded"),
        (WHOLE, (1, MOST_PIXELS + 1), (0, 0, 1, 48, 0), "size is outside of what is decoded"),
        (WHOLE, (1, MOST_PIXELS), (0, 0, 1, 48, 0), "of another size than the file says"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(image: Any, size: tuple[int, int], crop: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Stored([image()], sizes=[size]).decode(NativeDecoder(), [crop], side=16)


@pytest.mark.parametrize("plain", [False, True])
def test_bytes_are_compared_with_zlibs_checksum(plain: bool):
    """Of every length around those that vector instructions take at a time."""
    decoder, random = NativeDecoder(plain=plain), np.random.default_rng(0)
    for pixels in (*range(1, 100), 4096, 65_537):
        stored = Stored([random.integers(0, 256, (1, pixels, 3), dtype=np.uint8)])
        stored.sums = np.array([zlib.crc32(stored.image_bytes(0).tobytes())], dtype=np.uint32)
        stored.decode(decoder, [(0, 0, 1, pixels, 0)], side=1)
        stored.image_bytes(0)[int(random.integers(3 * pixels))] ^= 1 << int(random.integers(8))
        with pytest.raises(ValueError, match="not those that were written, by their checksum"):
            stored.decode(decoder, [(0, 0, 1, pixels, 0)], side=1)


def test_more_scans_than_any_encoder_makes_are_an_error():
    size = (0, 0, 64, 64, 0)
    for scans, decodes in ((MOST_SCANS, True), (MOST_SCANS + 1, False), (883, False)):
        stored = Stored([many_scans(scans)])
        if decodes:
            assert (stored.decode(NativeDecoder(), [size], side=16) == 128).all()
        else:
            with pytest.raises(ValueError, match="it has more scans than any encoder makes"):
                stored.decode(NativeDecoder(), [size], side=16)


def test_a_cmyk_jpeg_is_an_error():
    buffer = io.BytesIO()
    Image.new("CMYK", (48, 64)).save(buffer, format="JPEG")
    with pytest.raises(ValueError, match="neither grey nor of three colors"):
        Stored([buffer.getvalue()]).decode(NativeDecoder(), [(0, 0, 64, 48, 0)], side=16)


def test_a_decoder_goes_on_after_an_error():
    decoder = NativeDecoder()
    good = Stored([WHOLE()])
    expected = good.decode(decoder, [(0, 0, 64, 48, 0)], side=16)
    with pytest.raises(ValueError, match="image 0 "):
        Stored([WHOLE()[:300]], sizes=[(64, 48)]).decode(decoder, [(0, 0, 64, 48, 0)], side=16)
    assert np.array_equal(good.decode(decoder, [(0, 0, 64, 48, 0)], side=16), expected)


def test_names_of_decoders():
    with pytest.raises(ValueError, match="give auto or one of native, libffcv"):
        make_decoder("turbo")
    assert make_decoder().name == "native"


def test_a_beton_is_read_by_both(tmp_path: Path):
    source = ArraySource(np.stack(real_photos()), np.array([0, 1]), class_names=("temple", "flower"), name="photos")
    beton = Beton(write_beton(source, tmp_path / "x.beton", write_mode="jpg", progress=False))
    crops = center_crops(beton.heights, beton.widths, crop_ratio=1.0)
    outs = np.zeros((2, 2, 64, 64, 3), dtype=np.uint8)
    for out, name in zip(outs, ("native", "libffcv"), strict=True):
        make_decoder(name).decode(beton, np.array([0, 1]), crops, out, exact=True)
    assert np.abs(outs[0].astype(int) - outs[1]).mean() < 2
