"""Sources of labeled images, independent of file formats: `len`, `image(i)`, `label(i)`, class names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..draws import Operation, random_bits
from .base import SPLITS, ArraySource, Shares, Source, check_split
from .cifar import read_cifar
from .csv_list import csv, csv_stamp
from .folders import folder, folder_stamp
from .hugging_face import hf, hf_stamp
from .webdataset import webdataset, webdataset_stamp

_STATISTICS_IMAGES = 2000
_STATISTICS_SIDE_PX = 64


class SyntheticSource:
    """Images generated from their index: a wave pattern per class, with noise. Uses no disk."""

    def __init__(self, num_samples: int, *, num_classes: int, image_size: int, seed: int, epoch: int) -> None:
        self.name = "synthetic"
        self.class_names = tuple(f"class {i}" for i in range(num_classes))
        self._num_samples = num_samples
        self._image_size = image_size
        self._seed = seed
        self._stream = epoch

    def __len__(self) -> int:
        return self._num_samples

    def image(self, index: int) -> np.ndarray:
        noise = self._generator(index, self._stream)
        waves = self._generator(self.label(index), -1)
        side = np.arange(self._image_size) / self._image_size
        rows, columns, phases = waves.uniform(0.5, 3, 3), waves.uniform(0.5, 3, 3), waves.uniform(0, 1, 3)
        turns = side[:, None, None] * rows + side[None, :, None] * columns + phases
        pixels = 128 + 64 * np.sin(2 * np.pi * turns) + noise.normal(0, 24, (self._image_size, self._image_size, 3))
        return np.clip(np.round(pixels), 0, 255).astype(np.uint8)

    def label(self, index: int) -> int:
        return index % len(self.class_names)

    def fingerprint(self) -> str:
        return repr((self._num_samples, len(self.class_names), self._image_size, self._seed, self._stream))

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        key = random_bits(np.array([index]), seed=self._seed, epoch=stream, operation=Operation.PIXELS)[0, 0]
        return np.random.Generator(np.random.PCG64(int(key)))


def digits(
    *, split: str = "train", eval_fraction: float = 0.2, test_fraction: float = 0.0, split_seed: int = 0
) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits of 8x8 px, gray repeated to RGB.

    Every class is split in the same proportion, and no two splits share an image.

    Args:
        split: "train", "eval" or "test".
        eval_fraction, test_fraction: shares of every class that are held out for these splits, between 0 and 1.
        split_seed: changes the division.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    pixels, labels = _sklearns_digits()
    shares = Shares(eval_fraction, test_fraction, split_seed)
    chosen = shares.members(np.arange(len(labels)), labels, split)
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    images = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=-1))
    names = tuple(str(i) for i in range(10))
    return ArraySource(images, labels[chosen], class_names=names, name=f"digits {split}")


def cifar10(
    *,
    path: str | Path = "datasets",
    split: str = "train",
    eval_fraction: float | None = None,
    split_seed: int = 0,
    download: bool = True,
) -> ArraySource:
    """CIFAR-10 (Krizhevsky 2009): 60,000 images of 32x32 px in 10 classes, from the files that torchvision also uses.

    Args:
        path: the folder of `cifar-10-batches-py/`; if that is missing, it is unpacked from
            `cifar-10-python.tar.gz` there.
        split: "train" is the published 50,000 images, "eval" and "test" both the other 10,000.
        eval_fraction: share of every class of the 50,000 to move from "train" to "eval", replacing the 10,000.
        split_seed: changes the division of the 50,000.
        download: fetch the archive if it is missing (163 MiB); otherwise that is an error.

    Raises:
        FileNotFoundError: the files are missing, and `download` is False or fails.
        ValueError: they are not the published ones.
    """
    return _cifar("cifar10", path, split, eval_fraction, split_seed, download)


def cifar100(
    *,
    path: str | Path = "datasets",
    split: str = "train",
    eval_fraction: float | None = None,
    split_seed: int = 0,
    download: bool = True,
) -> ArraySource:
    """CIFAR-100 (Krizhevsky 2009): 60,000 images of 32x32 px in 100 classes; settings and errors as in `cifar10`.

    Its files are `cifar-100-python/`, its archive is `cifar-100-python.tar.gz` (161 MiB).
    """
    return _cifar("cifar100", path, split, eval_fraction, split_seed, download)


def synthetic(
    *, split: str = "train", num_samples: int = 512, num_classes: int = 10, image_size: int = 32, seed: int = 0
) -> SyntheticSource:
    """Images of `image_size` px generated from their index, for tests and for timing without a disk.

    Every split has `num_samples` images of the same classes; no two splits share an image.
    """
    check_split(split)
    for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} {value}: give a whole number of at least 1")
    return SyntheticSource(
        num_samples, num_classes=num_classes, image_size=image_size, seed=seed, epoch=SPLITS.index(split)
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "csv": csv,
    "digits": digits,
    "folder": folder,
    "hf": hf,
    "synthetic": synthetic,
    "webdataset": webdataset,
}
# Sources of encoded images, which are stored as JPEGs by default.
OF_FILES = ("csv", "folder", "hf", "webdataset")

_STAMPS: dict[str, Callable[..., str]] = {
    "csv": csv_stamp,
    "folder": folder_stamp,
    "hf": hf_stamp,
    "webdataset": webdataset_stamp,
}


def build_source(name: str, **settings: Any) -> Source:
    """The source `name` of `SOURCES`, made with `settings`.

    Raises:
        ValueError: unknown name (with the nearest match) or settings that the source does not have.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown source {name!r}; known: {', '.join(sorted(SOURCES))}{hint}")
    factory = SOURCES[name]
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        has = ", ".join(inspect.signature(factory).parameters)
        raise ValueError(f"settings {settings} do not fit source {name!r}: {error}; it has: {has}") from error
    return factory(**settings)


def source_stamp(name: str, **settings: Any) -> str:
    """A string that changes when the source's images change, as far as is visible without listing them.

    For a folder: the times at which the class folders last gained or lost a file. For shards, tables and lists: the
    sizes and times of their files. Empty for sources that their settings determine, and for what is not on this disk.
    """
    stamp = _STAMPS.get(name)
    return "" if stamp is None or "path" not in settings else stamp(**settings)


def channel_statistics(source: Source) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel on the 0..255 scale, weighting all images equally.

    Uses at most 2,000 evenly spaced images and a grid of about 64x64 px in each: exact for small data, and a matter
    of seconds for large.
    """
    return mean_and_std([channel_sums(source.image(int(index))) for index in statistics_picks(len(source))])


def labels_of(source: Source) -> np.ndarray:
    """int64 [N]: the label of each image; no image is read."""
    return np.fromiter((source.label(index) for index in range(len(source))), dtype=np.int64, count=len(source))


def statistics_picks(num_samples: int) -> np.ndarray:
    """int64: the images that the statistics use."""
    return np.unique(np.linspace(0, num_samples - 1, min(num_samples, _STATISTICS_IMAGES)).round().astype(int))


def channel_sums(image: np.ndarray) -> np.ndarray:
    """float64 [2, 3]: each channel's mean, and the mean of its squares, over a grid of pixels."""
    step = max(1, min(image.shape[:2]) // _STATISTICS_SIDE_PX)
    pixels = image[::step, ::step].reshape(-1, 3).astype(np.float64)
    return np.stack([pixels.mean(axis=0), (pixels**2).mean(axis=0)])


def mean_and_std(
    sums: Sequence[np.ndarray],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, from every image's `channel_sums`."""
    mean, square = np.sum(sums, axis=0) / len(sums)
    # A channel without any variation is left as it is instead of being divided by zero.
    std = np.sqrt(np.maximum(square - mean**2, 0))
    std = np.where(std < 1e-3, 1.0, std)
    return _triple(mean), _triple(std)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _cifar(
    name: Literal["cifar10", "cifar100"],
    path: str | Path,
    split: str,
    eval_fraction: float | None,
    split_seed: int,
    download: bool,
) -> ArraySource:
    check_split(split)
    held_out = split == "test" or (split == "eval" and eval_fraction is None)
    images, labels, class_names = read_cifar(name, Path(path), train=not held_out, download=download)
    if not held_out and eval_fraction is not None:
        chosen = Shares(eval_fraction, 0.0, split_seed).members(np.arange(len(labels)), labels, split)
        images, labels = images[chosen], labels[chosen]
    return ArraySource(images, labels, class_names=class_names, name=f"{name} {split}")


@cache
def _sklearns_digits() -> tuple[np.ndarray, np.ndarray]:
    """float64 [1797, 8, 8] from 0 to 16, and labels [1797], from scikit-learn's own file.

    Imports scikit-learn, which takes seconds, only if a release keeps the file elsewhere.
    """
    spec = find_spec("sklearn")
    for home in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(home, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            rows = np.loadtxt(path, delimiter=",")
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise ModuleNotFoundError(
            "the digits come with scikit-learn; install it: pip install 'brisk-vision[demo]'",
            name="sklearn",
        ) from error
    bunch: Any = load_digits()
    return bunch.images, np.asarray(bunch.target)
