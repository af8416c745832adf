"""Image files of every kind become RGB, are stored as they are, or are left out with a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import many_scans
from PIL import Image

from data import Beton, FFCVLoader, folder, write_beton
from data.beton.format import report_path
from data.sources import FolderSource
from data.sources.image_file import UnusableImage, conversions, fitted_size, is_plain_jpeg, open_image, rgb_pixels

pytestmark = pytest.mark.timeout(60)

ORIENTATION = 0x0112


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """A smooth picture that looks different upside down and mirrored."""
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 200 // height, columns * 200 // width, (rows + columns) * 200 // (height + width)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(photo(), "JPEG", quality=95, exif=exif)


def sixteen_bits(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header speaks of `width` x `height` px."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixels(data: bytes, **settings) -> np.ndarray:
    return rgb_pixels(open_image(data), **settings)


def test_grey_palette_and_cmyk():
    grey = np.asarray(photo().convert("L"))
    assert np.array_equal(pixels(saved(photo().convert("L"), "PNG")), np.repeat(grey[..., None], 3, axis=-1))
    palette = photo().quantize(16)
    assert np.array_equal(pixels(saved(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert np.array_equal(pixels(saved(palette, "GIF")), np.asarray(palette.convert("RGB")))
    cmyk = pixels(saved(photo().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.asarray(photo())).mean() < 3  # a lossy file


def test_16_bits_keep_their_range():
    values = np.array([[0, 128, 32_768], [257 * 99, 65_407, 65_535]])
    for kind in ("PNG", "TIFF"):
        found = pixels(saved(sixteen_bits(values), kind))
        assert np.array_equal(found[..., 0], np.round(values / 257)), kind
        assert conversions(open_image(saved(sixteen_bits(values), kind))) == ["grey", "16 bits"]


def test_alpha_is_laid_over_white():
    color, alpha = np.array([10, 100, 250]), np.array([0, 51, 128, 255])
    image = np.zeros((1, 4, 4), np.uint8)
    image[..., :3], image[..., 3] = color, alpha
    share = alpha[:, None] / 255
    expected = color * share + 255 * (1 - share)
    for data in (
        saved(Image.fromarray(image), "PNG"),
        saved(Image.fromarray(image), "WEBP", lossless=True, exact=True),
    ):
        assert np.abs(pixels(data)[0] - expected).max() <= 1
        assert conversions(open_image(data)) == ["alpha laid over white"]
    see_through = Image.new("P", (2, 1))
    see_through.putpalette([9, 9, 9, 200, 0, 0])
    see_through.putpixel((1, 0), 1)
    assert pixels(saved(see_through, "PNG", transparency=0)).tolist() == [[[255] * 3, [200, 0, 0]]]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_exif_orientation(orientation: int, upright: Callable[[np.ndarray], np.ndarray]):
    """Against EXIF 2.32's definition: where row 0 and column 0 of the file are to be seen."""
    data = turned(orientation)
    lying = pixels(saved(photo(), "JPEG", quality=95))
    assert np.array_equal(pixels(data), upright(lying))
    assert conversions(open_image(data)) == ["EXIF orientation"]
    assert not is_plain_jpeg(open_image(data), data)
    small = pixels(data, max_side_px=30)
    assert small.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3))


def test_damaged_exif_does_not_matter():
    data = saved(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels(data).shape == (40, 60, 3)


def test_smaller_images_are_averages():
    """By whole numbers of pixels, so that the mean of blocks is the answer; to rounding."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for kind, ratio in (("PNG", 2), ("JPEG", 4), ("JPEG", 10)):
        data = saved(Image.fromarray(noise), kind)
        blocks = pixels(data).reshape(300 // ratio, ratio, 400 // ratio, ratio, 3).mean(axis=(1, 3))
        assert np.abs(pixels(data, max_side_px=400 // ratio) - blocks).max() <= 1


def test_fitted_size():
    assert fitted_size((640, 480), 500) == (500, 375)
    assert fitted_size((480, 640), 640) == (480, 640)
    assert fitted_size((10_000, 1), 500) == (500, 1)
    assert fitted_size((640, 480), None) == (640, 480)


UNUSABLE = {
    "zero bytes": (b"", "it has no bytes"),
    "text": (b"<html>404 Not Found</html>", "it is not an image file of these kinds: BMP"),
    "half": (saved(photo(200, 200), "JPEG")[:1500], "truncated"),
    "cut by 1 %": (saved(photo(300, 300), "JPEG", quality=95)[: -len(saved(photo(300, 300), "JPEG")) // 100], "trunc"),
    "png": (saved(photo(), "PNG")[:80], "truncated"),
    "header": (saved(photo(), "JPEG")[:30], "it cannot be decoded|not an image"),
    "bomb": (
        png_that_claims(60_000, 60_000),
        "decompression bomb.*; an image may have 89,478,485 pixels",
    ),
    "scans": (many_scans(101), "it has 101 scans; a JPEG may have 100: save it anew"),
    "large": (png_that_claims(10_000, 10_000), "it is of 10000x10000 px; an image may have 89,478,485 pixels: make"),
    "float": (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32 bits .mode F."),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file of these kinds"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_says_why(name: str):
    data, reason = UNUSABLE[name]
    with pytest.raises(UnusableImage, match=reason):
        pixels(data)


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (saved(photo(), "JPEG"), True),
        (saved(photo(), "JPEG", progressive=True), True),
        (saved(photo(), "JPEG", keep_rgb=True), True),
        (saved(photo(), "JPEG", subsampling=0, restart_marker_rows=1, comment=b"\xff" * 300), True),
        (turned(1), True),
        (turned(6), False),
        (saved(photo().convert("L"), "JPEG"), False),
        (saved(photo().convert("CMYK"), "JPEG"), False),
        (saved(photo(), "PNG"), False),
    ],
)
def test_which_jpegs_are_stored_as_they_are(tmp_path: Path, data: bytes, plain: bool):
    assert is_plain_jpeg(open_image(data), data) == plain
    path = write_files(tmp_path, {"a/1.jpg": data})
    beton = Beton(write_beton(folder(path), tmp_path / "x.beton", write_mode="jpg", progress=False))
    assert (beton.image_bytes(0).tobytes() == data) == plain
    loader = FFCVLoader(beton.path, per_device_batch_size=1, image_size=16, train=False)
    assert next(iter(loader))[0].shape == (1, 3, 16, 16)


def test_a_jpeg_that_is_too_large_is_made_smaller(tmp_path: Path):
    data = saved(photo(), "JPEG")
    path = write_files(tmp_path, {"a/1.jpg": data})
    settings = {"write_mode": "jpg", "progress": False}
    kept = Beton(write_beton(folder(path), tmp_path / "kept.beton", max_side_px=60, **settings))
    smaller = Beton(write_beton(folder(path), tmp_path / "smaller.beton", max_side_px=59, **settings))
    assert kept.image_bytes(0).tobytes() == data
    assert (smaller.heights[0], smaller.widths[0]) == (39, 59)
    assert (kept.sidecar["stored"], smaller.sidecar["stored"]) == ({"as it was": 1}, {"jpeg": 1})


def test_a_jpeg_whose_data_is_damaged_never_reaches_the_loader_as_it_is(tmp_path: Path):
    """Pillow reads some of them with grey patches; the loader's decoder would refuse them in the middle of a run."""
    data = saved(photo(300, 200), "JPEG", quality=95)
    files = {"a/whole.jpg": data}
    for place in range(700, len(data) - 700, 500):
        files[f"a/{place}.jpg"] = data[:place] + bytes(20) + data[place + 20 :]
    source = folder(write_files(tmp_path, files))
    path = write_beton(source, tmp_path / "x.beton", write_mode="jpg", strict=False, progress=False)
    loader = FFCVLoader(path, per_device_batch_size=1, image_size=224, train=False, drop_last=False)
    left_out = Beton(path).sidecar["left_out"]
    assert len(list(loader)) + left_out == len(files)
    assert Beton(path).sidecar["stored"]["as it was"] < len(files)


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "images"


ODD = {
    "ant/1.jpg": saved(photo(), "JPEG"),
    "ant/2.jpg": saved(photo().convert("CMYK"), "JPEG"),
    "ant/3.png": saved(photo().convert("RGBA"), "PNG"),
    "ant/4.png": saved(photo().convert("L"), "PNG"),
    "ant/5.png": saved(photo().quantize(8), "PNG"),
    "ant/6.jpg": turned(6),
    "bee/1.png": saved(sixteen_bits(np.full((5, 4), 40_000)), "PNG"),
    "bee/2.gif": saved(photo().quantize(8), "GIF"),
    "bee/3.jpg": saved(photo(), "PNG"),  # by another name
    "bee/line.png": saved(photo(3000, 1), "PNG"),
} | {f"bee/bad {name}.jpg": data for name, (data, _) in UNUSABLE.items()}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_folder_of_odd_images(tmp_path: Path):
    source = folder(write_files(tmp_path, ODD))
    path = write_beton(source, tmp_path / "x.beton", write_mode="jpg", max_side_px=500, strict=False, progress=False)
    beton = Beton(path)
    assert len(beton) == 10
    assert beton.labels.tolist() == [0] * 6 + [1] * 4
    assert beton.sidecar["converted"] == {
        "16 bits": 1, "CMYK": 1, "EXIF orientation": 1, "alpha laid over white": 1, "grey": 2, "palette": 2,
    }  # fmt: skip
    assert beton.sidecar["stored"] == {"as it was": 1, "jpeg": 9}
    assert (beton.sidecar["class_counts"], beton.sidecar["left_out"]) == ([6, 4], len(UNUSABLE))
    assert (beton.heights[5], beton.widths[5]) == (60, 40)
    assert (beton.heights[9], beton.widths[9]) == (1, 500)
    report = dict(line.split("\t") for line in report_path(path).read_text().splitlines())
    assert {Path(name).stem for name in report} == {f"bad {name}" for name in UNUSABLE}
    assert report[str(tmp_path / "images" / "bee" / "bad zero bytes.jpg")] == "it has no bytes"
    loader = FFCVLoader(path, per_device_batch_size=5, image_size=32, train=True)
    assert sum(len(labels) for _ in range(3) for _, labels in loader) == 30

    again = write_beton(folder(write_files(tmp_path / "good", {"a/1.jpg": ODD["ant/1.jpg"]})), path, progress=False)
    assert not report_path(again).exists()


def test_strict_names_the_first_and_leaves_nothing(tmp_path: Path):
    source = folder(write_files(tmp_path, {"a/1.jpg": ODD["ant/1.jpg"], "a/2.jpg": b""}))
    with pytest.raises(ValueError, match=r"a/2.jpg cannot be stored: it has no bytes. Repair or remove it"):
        write_beton(source, tmp_path / "x.beton", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_a_class_without_a_usable_image_is_refused(tmp_path: Path):
    source = folder(write_files(tmp_path, {"ant/1.jpg": ODD["ant/1.jpg"], "bee/1.jpg": b"", "bee/2.jpg": b"no"}))
    with pytest.raises(ValueError, match=r"no image of bee in .* can be used; the first is .*bee/1.jpg: it has no by"):
        write_beton(source, tmp_path / "x.beton", strict=False, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_a_file_that_is_gone_or_forbidden_is_left_out(tmp_path: Path):
    files = [(tmp_path / "1.jpg", 0), (tmp_path / "gone.jpg", 0), (tmp_path, 0)]
    files[0][0].write_bytes(ODD["ant/1.jpg"])
    source = FolderSource(tmp_path, class_names=("a",), files=files)
    path = write_beton(source, tmp_path / "x.beton", strict=False, progress=False)
    assert len(Beton(path)) == 1
    assert "it cannot be read: No such file" in report_path(path).read_text()


def test_odd_names_keep_to_their_line(tmp_path: Path):
    source = folder(write_files(tmp_path, {"a/1.jpg": ODD["ant/1.jpg"], "a/two\nlines\té.jpg": b""}))
    path = write_beton(source, tmp_path / "x.beton", strict=False, progress=False)
    (line,) = report_path(path).read_text().splitlines()
    assert line.endswith("two\\nlines\\té.jpg\tit has no bytes")


def test_a_share_of_jpegs(tmp_path: Path, photos):
    for share, bounds in ((0.0, (0, 0)), (0.5, (8, 22)), (1.0, (30, 30))):
        path = tmp_path / f"{share}.beton"
        beton = Beton(write_beton(photos, path, write_mode="proportion", jpeg_share=share, progress=False))
        assert bounds[0] <= int(beton.is_jpeg(np.arange(30)).sum()) <= bounds[1]
        assert sum(beton.sidecar["stored"].values()) == 30
    again = write_beton(photos, tmp_path / "again.beton", write_mode="proportion", jpeg_share=0.5, progress=False)
    assert again.read_bytes() == (tmp_path / "0.5.beton").read_bytes()
