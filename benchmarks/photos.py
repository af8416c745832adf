"""JPEG files like ImageNet's, cut from the photos that scikit-learn and scikit-image ship, and a .beton file of them.

    python -m benchmarks.photos .cache/brisk/benchmark_photos --images 2000

Image i depends only on i and the photos: a crop of random position, scale and orientation, 500 px on its longer side
and 375 to 400 on the other, at the highest JPEG quality that keeps the file below a size drawn from 94.5 to 130 kB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

VERSION = 1  # of the set, in its folder's name
NUM_CLASSES = 10
LONG_SIDE_PX, SHORT_SIDES_PX = 500, (375, 400)
FILE_BYTES = (90_000, 130_000)
QUALITIES = (50, 98)  # of JPEG
SCALES = (0.7, 1.4)  # photo pixels per pixel of the crop, on a side
BETON_MAX_SIDE_PX, BETON_JPEG_QUALITY = 500, 90
# The color photos in scikit-image's wheel; the rest of skimage.data is gray, drawn or downloaded.
SKIMAGE_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


class PhotoSet(NamedTuple):
    """A finished set: its folder has one folder per class."""

    folder: Path
    num_images: int
    mean_bytes: float
    photos: tuple[str, ...]


def make_photos(cache_folder: Path, num_images: int) -> PhotoSet:
    """The set of `num_images`, made if `cache_folder` does not hold it yet; written completely or not at all.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    photos = find_photos()
    with_skimage = len(photos) > 2
    folder = cache_folder / f"v{VERSION}-{'skimage' if with_skimage else 'sklearn'}-{num_images}"
    if not folder.is_dir():
        partial_folder = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        try:
            _write_photos(partial_folder, num_images, photos)
            partial_folder.rename(folder)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    return PhotoSet(folder, len(sizes), float(np.mean(sizes)), tuple(path.name for path in photos))


def find_photos() -> list[Path]:
    """The installed photos: scikit-learn's two, and scikit-image's if it is installed."""
    sklearn = _package_folder("sklearn")
    if sklearn is None:
        raise ModuleNotFoundError(
            "the photos are those of scikit-learn, which is not installed; install this package with its extra 'bench'",
            name="sklearn",
        )
    found = [sklearn / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    skimage = _package_folder("skimage")
    if skimage is not None:
        found += [skimage / "data" / name for name in SKIMAGE_PHOTOS]
    return [path for path in found if path.is_file()]


def cut(index: int, photos: Sequence[Path]) -> bytes:
    """Image `index` of the set, as a JPEG file."""
    draws = np.random.default_rng([VERSION, index])
    most_bytes = int(draws.integers(FILE_BYTES[0] + FILE_BYTES[0] // 20, FILE_BYTES[1]))
    while True:  # a smooth part of a photo reaches the size at no quality: try another one
        image = _random_cut(draws, photos)
        data = _largest_below(image, most_bytes)
        if FILE_BYTES[0] <= len(data) <= FILE_BYTES[1]:
            return data


def make_beton(photo_set: PhotoSet, *, timeout_seconds: float) -> tuple[Path, str]:
    """(the set as a .beton file, its writer): FFCV's DatasetWriter, or this package's if FFCV's is missing or fails.

    FFCV's runs in its own process, since it hangs when one of its workers dies.
    """
    reason = "FFCV is not installed"
    if _package_folder("ffcv") is not None:
        path = photo_set.folder.with_name(f"{photo_set.folder.name}-ffcv.beton")
        if path.is_file():
            return path, "ffcv"
        reason = _write_with_ffcv(photo_set.folder, path, timeout_seconds=timeout_seconds)
        if not reason:
            return path, "ffcv"
    print(f"FFCV's writer is left out: {reason}; the file is written by this package", file=sys.stderr)
    from data import write_beton
    from data.sources import folder

    path = photo_set.folder.with_name(f"{photo_set.folder.name}-brisk.beton")
    if not path.is_file():
        settings = {"max_side_px": BETON_MAX_SIDE_PX, "jpeg_quality": BETON_JPEG_QUALITY}
        write_beton(folder(photo_set.folder), path, write_mode="jpg", progress=False, **settings)
    return path, "brisk-vision"


def _write_photos(folder: Path, num_images: int, photos: Sequence[Path]) -> None:
    for label in range(NUM_CLASSES):
        (folder / f"class_{label}").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, data in enumerate(pool.map(partial(cut, photos=photos), range(num_images))):
            (folder / f"class_{index % NUM_CLASSES}" / f"{index:06}.jpg").write_bytes(data)
    (folder / "photos.json").write_text(json.dumps({"version": VERSION, "photos": [path.name for path in photos]}))


def _random_cut(draws: np.random.Generator, photos: Sequence[Path]) -> Image.Image:
    photo = _open_photo(photos[int(draws.integers(len(photos)))])
    width, height = LONG_SIDE_PX, int(draws.integers(SHORT_SIDES_PX[0], SHORT_SIDES_PX[1] + 1))
    if draws.random() < 0.25:  # ImageNet has more wide photos than tall ones
        width, height = height, width
    largest = min(photo.width / width, photo.height / height)
    scale = draws.uniform(min(SCALES[0], 0.8 * largest), min(SCALES[1], largest))
    left = draws.uniform(0, photo.width - scale * width)
    top = draws.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.random() < 0.5 else image


def _largest_below(image: Image.Image, most_bytes: int) -> bytes:
    # The file's size grows with the quality, so bisect.
    low, high = QUALITIES
    best = b""
    while low <= high:
        middle = (low + high) // 2
        file = io.BytesIO()
        image.save(file, "JPEG", quality=middle)
        if file.tell() <= most_bytes:
            best, low = file.getvalue(), middle + 1
        else:
            high = middle - 1
    return best


@cache
def _open_photo(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _package_folder(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _write_with_ffcv(folder: Path, path: Path, *, timeout_seconds: float) -> str:
    # Returns the reason for a failure, or "".
    partial_path = path.with_name(f"{path.name}.partial-{os.getpid()}")
    command = [
        sys.executable,
        "-m",
        "benchmarks.photos",
        str(folder.resolve()),
        "--write-beton",
        str(partial_path.resolve()),
    ]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout_seconds
        )
        if done.returncode == 0:
            partial_path.rename(path)
            return ""
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        return f"no end within {timeout_seconds:g} s"
    finally:
        partial_path.unlink(missing_ok=True)


class _LabeledFiles:
    """What FFCV's writer reads: (image, label) by index."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))
        self.labels = {path.name: label for label, path in enumerate(sorted(folder.glob("class_*")))}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.paths[index]
        return Image.open(path).convert("RGB"), self.labels[path.parent.name]


def _run_ffcvs_writer(folder: Path, path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=BETON_MAX_SIDE_PX, jpeg_quality=BETON_JPEG_QUALITY)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=2)
    writer.from_indexed_dataset(_LabeledFiles(folder))


def main() -> None:
    """Make the set, or only write an existing set with FFCV's writer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where sets are kept")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--write-beton", type=Path, metavar="FILE", help="write the images of this very folder there")
    options = parser.parse_args()
    if options.write_beton is not None:
        _run_ffcvs_writer(options.folder, options.write_beton)
        return
    made = make_photos(options.folder, options.images)
    print(f"{made.num_images} images of {made.mean_bytes / 1000:.0f} kB on average in {made.folder}")


if __name__ == "__main__":
    main()
