"""Where labeled images come from, before any file format: `len`, `image(i)`, `label(i)`, class names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.draws import Operation, random_bits

_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_EVAL_FOLDERS = ("val", "eval", "test")
_STATISTICS_IMAGES = 2000
_STATISTICS_SIDE_PX = 64


class Source(Protocol):
    """Labeled images that can be asked for one at a time, from several threads and processes at once."""

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """uint8 array [height, width, 3], RGB."""
        ...

    def label(self, index: int) -> int:
        """Index into `class_names`."""
        ...


class ArraySource:
    """Images and labels that are in memory: uint8 [N, height, width, 3] and int [N]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, class_names: tuple[str, ...], name: str) -> None:
        self.name = name
        self.class_names = class_names
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])


class SyntheticSource:
    """Images made from their index: a pattern of waves that tells the class, under noise. Costs no disk."""

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

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        key = random_bits(np.array([index]), seed=self._seed, epoch=stream, operation=Operation.PIXELS)[0, 0]
        return np.random.Generator(np.random.PCG64(int(key)))


class FolderSource:
    """Image files, one folder a class; classes and files in alphabetical order. All are converted to RGB."""

    def __init__(self, path: Path, *, class_names: tuple[str, ...], files: list[tuple[Path, int]]) -> None:
        self.name = f"folder {path}"
        self.class_names = class_names
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        path = self._files[index][0]
        try:
            with Image.open(path) as image:
                return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove the file") from error

    def label(self, index: int) -> int:
        return self._files[index][1]


def digits(*, split: str = "train", eval_fraction: float = 0.2, split_seed: int = 0) -> ArraySource:
    """1,797 handwritten digits of 8x8 px that come with scikit-learn, grey repeated to RGB.

    Every class is split in the same proportion, and the two splits share no image.

    Args:
        split: "train" or "eval".
        eval_fraction: share of every class that is kept for evaluation, between 0 and 1.
        split_seed: another number, another division into the two.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    _check_split(split)
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction {eval_fraction}: give a number between 0 and 1")
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
    chosen = _stratified(np.asarray(bunch.target), fraction=eval_fraction, seed=split_seed)
    chosen = chosen if split == "eval" else ~chosen
    grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=-1))
    names = tuple(str(i) for i in range(10))
    return ArraySource(images, bunch.target[chosen], class_names=names, name=f"digits {split}")


def synthetic(
    *, split: str = "train", num_samples: int = 512, num_classes: int = 10, image_size: int = 32, seed: int = 0
) -> SyntheticSource:
    """Images of `image_size` px made from their index, for tests and for timing without a disk.

    Both splits have `num_samples` images of the same classes, and no image in common.
    """
    _check_split(split)
    for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} {value}: give a whole number of at least 1")
    return SyntheticSource(
        num_samples, num_classes=num_classes, image_size=image_size, seed=seed, epoch=("train", "eval").index(split)
    )


def folder(path: str | Path, *, split: str | None = None) -> FolderSource:
    """Images in files, one folder a class: `path/<class>/<anything>.jpg`, at any depth below the class.

    Args:
        split: None reads `path` itself; "train" reads `path/train`; "eval" reads `path/val`, `path/eval` or
            `path/test`, whichever is there first.

    Raises:
        FileNotFoundError: no such folder, no classes in it, or no images in a class.
    """
    root = _split_folder(Path(path), split)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: an image folder holds one folder a class with the images in it, as {root}/cat/1.jpg; "
            "correct the path, or unpack the data there"
        )
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"{root} has no folders in it: put the images of each class into a folder of its own")
    files: list[tuple[Path, int]] = []
    for label, class_path in enumerate(classes):
        own = sorted(p for p in class_path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES and p.is_file())
        if not own:
            raise FileNotFoundError(
                f"no images in {class_path}: looked for {', '.join(_IMAGE_SUFFIXES)}; add some or remove the folder"
            )
        files += [(p, label) for p in own]
    return FolderSource(root, class_names=tuple(p.name for p in classes), files=files)


SOURCES: dict[str, Callable[..., Source]] = {"digits": digits, "folder": folder, "synthetic": synthetic}


def build_source(name: str, **settings: Any) -> Source:
    """The source that `name` stands for in `SOURCES`, made with `settings`.

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
    """Changes when the source's images have changed, as far as can be seen without listing them.

    For a folder: the times at which the class folders last gained or lost a file. Empty for the others, whose settings
    say everything.
    """
    if name != "folder" or "path" not in settings:
        return ""
    root = _split_folder(Path(settings["path"]), settings.get("split"))
    if not root.is_dir():
        return ""
    return ",".join(f"{p.name}:{p.stat().st_mtime_ns}" for p in sorted(root.iterdir()) if p.is_dir())


def channel_statistics(source: Source) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel on the 0..255 scale, every image counting the same.

    Looks at 2,000 evenly spaced images at most, and at a grid of about 64 px a side in each: exact for small data,
    and a matter of seconds for large.
    """
    picks = np.unique(np.linspace(0, len(source) - 1, min(len(source), _STATISTICS_IMAGES)).round().astype(int))
    sums = np.zeros((2, 3))
    for index in picks:
        image = source.image(int(index))
        step = max(1, min(image.shape[:2]) // _STATISTICS_SIDE_PX)
        pixels = image[::step, ::step].reshape(-1, 3).astype(np.float64)
        sums += pixels.mean(axis=0), (pixels**2).mean(axis=0)
    mean, square = sums / len(picks)
    # A channel without any variation is left as it is instead of being divided by zero.
    std = np.sqrt(np.maximum(square - mean**2, 0))
    std = np.where(std < 1e-3, 1.0, std)
    return _triple(mean), _triple(std)


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _check_split(split: str) -> None:
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: give 'train' or 'eval'")


def _stratified(labels: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    # Within each class, the images whose hash is smallest.
    bits = random_bits(np.arange(len(labels)), seed=seed, epoch=0, operation=Operation.SPLIT)[:, 0]
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(bits[members], kind="stable")]
        chosen[members[: round(fraction * len(members))]] = True
    return chosen


def _split_folder(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    _check_split(split)
    if split == "train":
        return path / "train"
    present = [path / name for name in _EVAL_FOLDERS if (path / name).is_dir()]
    return present[0] if present else path / _EVAL_FOLDERS[0]
