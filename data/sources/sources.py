"""Sources of labeled images, independent of file formats: `len`, `image(i)`, `label(i)`, class names."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from ..draws import Operation, random_bits
from .cifar import read_cifar
from .image_file import UnusableImage, open_image, rgb_pixels

log = logging.getLogger(__name__)

SPLITS = ("train", "eval", "test")

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_FOLDERS = {
    "train": ("train",),
    "eval": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}
# Created by macOS archives, Synology, Windows and ext4: they are not classes.
_NO_CLASSES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_STATISTICS_IMAGES = 2000
_STATISTICS_SIDE_PX = 64


class Source(Protocol):
    """Labeled images that several threads and processes can read at once, one image at a time."""

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """uint8 array [height, width, 3], RGB."""
        ...

    def label(self, index: int) -> int:
        """Index into `class_names`."""
        ...


@runtime_checkable
class FileSource(Source, Protocol):
    """A source with one file per image, so that images can be stored without being encoded again."""

    def path(self, index: int) -> Path:
        """The image's file."""
        ...


class ArraySource:
    """Images and labels in memory: uint8 [N, height, width, 3] and int [N]."""

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

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        key = random_bits(np.array([index]), seed=self._seed, epoch=stream, operation=Operation.PIXELS)[0, 0]
        return np.random.Generator(np.random.PCG64(int(key)))


class FolderSource:
    """Image files, one folder per class; classes and files in alphabetical order. `image_file` decodes them.

    Attributes:
        passed_over: number of files in the class folders without an image suffix.
    """

    def __init__(
        self, path: Path, *, class_names: tuple[str, ...], files: list[tuple[Path, int]], passed_over: int = 0
    ) -> None:
        self.name = f"folder {path}"
        self.class_names = class_names
        self.passed_over = passed_over
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        return self._files[index][0]

    def image(self, index: int) -> np.ndarray:
        path = self.path(index)
        try:
            return rgb_pixels(open_image(path.read_bytes()))
        except (OSError, UnusableImage) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove the file") from error

    def label(self, index: int) -> int:
        return self._files[index][1]


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
    shares = _Shares(eval_fraction, test_fraction, split_seed)
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
    _check_split(split)
    for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} {value}: give a whole number of at least 1")
    return SyntheticSource(
        num_samples, num_classes=num_classes, image_size=image_size, seed=seed, epoch=SPLITS.index(split)
    )


def folder(
    path: str | Path,
    *,
    split: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
) -> FolderSource:
    """Image files, one folder per class: `path/<class>/<anything>.jpg`, at any depth below the class.

    Args:
        split: None reads `path` itself; "train" reads `path/train`; "eval" reads the first that exists of `path/val`,
            `valid`, `validation`, `eval` and `test`; "test" reads `path/test`.
        eval_fraction: divide one set of images instead: "eval" gets this share of every class of `path/train` (`path`
            if there is no such folder), and "train" the rest.
        test_fraction: the same for "test"; 0 reads `path/test`.
        split_seed: changes the division, which depends on the file names, so that adding a file moves at most one
            other.

    The classes are those of the training split. An evaluation split may lack some, for example rare ones; one that
    has others is refused. Folders that operating systems and editors create are not classes. Both cause a warning.

    Raises:
        FileNotFoundError: no such folder, no classes in it, or no images in a training class.
        ValueError: evaluation classes that are not training classes, or a class too small to be divided.
    """
    path = Path(path)
    root = _split_folder(path, split, eval_fraction, test_fraction)
    classes = [folder.name for folder in _class_folders(root)]
    if not classes:
        raise FileNotFoundError(f"{root} has no folders in it: put the images of each class into a folder of its own")
    trained = classes
    if split is not None and root != path:
        trained = _classes_to_train_on(root, classes, path, split)
    source = _list_images(root, trained, may_lack=trained is not classes)
    if split is None or eval_fraction is None or (split == "test" and not test_fraction):
        return source
    return _divided(source, root, split, _Shares(eval_fraction, test_fraction, split_seed))


SOURCES: dict[str, Callable[..., Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "folder": folder,
    "synthetic": synthetic,
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

    For a folder: the times at which the class folders last gained or lost a file. Empty for sources that their
    settings determine.
    """
    if name != "folder" or "path" not in settings:
        return ""
    split, fractions = settings.get("split"), (settings.get("eval_fraction"), settings.get("test_fraction", 0.0))
    root = _split_folder(Path(settings["path"]), split, *fractions)
    if not root.is_dir():
        return ""
    return ",".join(f"{p.name}:{p.stat().st_mtime_ns}" for p in sorted(root.iterdir()) if p.is_dir())


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


class _Shares:
    """Divides images into train, eval and test, every class in the same proportion."""

    def __init__(self, eval_fraction: float, test_fraction: float, seed: int) -> None:
        for name, value in (("eval_fraction", eval_fraction), ("test_fraction", test_fraction)):
            if not 0 <= value < 1 or (name == "eval_fraction" and value == 0):
                raise ValueError(f"{name} {value}: give a number between 0 and 1")
        if eval_fraction + test_fraction >= 1:
            raise ValueError(
                f"eval_fraction {eval_fraction} and test_fraction {test_fraction} leave nothing to train on: give "
                "shares whose sum is below 1"
            )
        self._bounds = {"eval": (0.0, eval_fraction), "test": (eval_fraction, eval_fraction + test_fraction)}
        self._bounds["train"] = (eval_fraction + test_fraction, 1.0)
        self._seed = seed

    def members(self, keys: np.ndarray, labels: np.ndarray, split: str) -> np.ndarray:
        """bool [N]: which images, identified by `keys`, are in the split."""
        _check_split(split)
        start, end = self._bounds[split]
        if start == end:
            raise ValueError(f"split {split!r} has no images: give a test_fraction above 0")
        bits = random_bits(keys, seed=self._seed, epoch=0, operation=Operation.SPLIT)[:, 0]
        chosen = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            members = members[np.argsort(bits[members], kind="stable")]
            chosen[members[round(start * len(members)) : round(end * len(members))]] = True
        return chosen


def _cifar(
    name: Literal["cifar10", "cifar100"],
    path: str | Path,
    split: str,
    eval_fraction: float | None,
    split_seed: int,
    download: bool,
) -> ArraySource:
    _check_split(split)
    held_out = split == "test" or (split == "eval" and eval_fraction is None)
    images, labels, class_names = read_cifar(name, Path(path), train=not held_out, download=download)
    if not held_out and eval_fraction is not None:
        chosen = _Shares(eval_fraction, 0.0, split_seed).members(np.arange(len(labels)), labels, split)
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


def _check_split(split: str, allowed: Sequence[str] = SPLITS) -> None:
    if split not in allowed:
        raise ValueError(f"split {split!r}: give one of {', '.join(allowed)}")


def _split_folder(path: Path, split: str | None, eval_fraction: float | None, test_fraction: float) -> Path:
    if split is None:
        return path
    _check_split(split)
    if eval_fraction is not None and (split != "test" or test_fraction):
        return path / "train" if (path / "train").is_dir() else path
    names = _SPLIT_FOLDERS[split]
    present = [path / name for name in names if (path / name).is_dir()]
    return present[0] if present else path / names[0]


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: an image folder holds one folder a class with the images in it, as {root}/cat/1.jpg; "
            "correct the path, or unpack the data there"
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    left_out = [p.name for p in folders if _is_no_class(p.name)]
    if left_out:
        _say_once(f"{root}: left out, for they hold no class: {_some(left_out)}")
    return [p for p in folders if not _is_no_class(p.name)]


def _is_no_class(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _classes_to_train_on(root: Path, classes: list[str], path: Path, split: str) -> list[str]:
    """The classes of the training split, `classes` if that is this split or there is no other.

    Raises ValueError if an evaluation split has a class that is not among them.
    """
    other = _split_folder(path, "eval" if split == "train" else "train", None, 0.0)
    others = [folder.name for folder in _class_folders(other)] if other.is_dir() and other != root else []
    if not others:
        return classes
    trained, evaluated = (classes, others) if split == "train" else (others, classes)
    unknown = sorted(set(evaluated) - set(trained))
    if unknown:
        train, evaluation = (root, other) if split == "train" else (other, root)
        raise ValueError(
            f"the classes of {train} and {evaluation} differ: {evaluation} alone has {_some(unknown)}, which no image "
            f"is there to learn from; add images to {train}, or remove the folders from {evaluation}"
        )
    return classes if split == "train" else others


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list_images(root: Path, classes: list[str], *, may_lack: bool) -> FolderSource:
    """may_lack: whether a class may have no image here."""
    files: list[tuple[Path, int]] = []
    passed_over, lacking = 0, []
    for label, name in enumerate(classes):
        found = _visible_files(root / name)
        own = sorted(p for p in found if p.suffix.lower() in _IMAGE_SUFFIXES)
        passed_over += len(found) - len(own)
        files += [(p, label) for p in own]
        if not own:
            lacking.append(name)
    if lacking and (not may_lack or not files):
        raise FileNotFoundError(
            f"no images in {root / lacking[0]}: looked for {', '.join(_IMAGE_SUFFIXES)}; add some or remove the folder"
        )
    if lacking:
        _say_once(f"{root}: no images of {_some(lacking)}; the other {len(classes) - len(lacking)} classes are there")
    return FolderSource(root, class_names=tuple(classes), files=files, passed_over=passed_over)


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_no_class(name)]  # editors keep copies of images there
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return found


def _divided(source: FolderSource, root: Path, split: str, shares: _Shares) -> FolderSource:
    files = [(source.path(i), source.label(i)) for i in range(len(source))]
    labels = np.array([label for _, label in files])
    names = (p.relative_to(root).as_posix().encode(errors="surrogateescape") for p, _ in files)
    keys = np.array([int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") for name in names], np.uint64)
    chosen = shares.members(keys, labels, split)
    for label, name in enumerate(source.class_names):
        if not chosen[labels == label].any():
            raise ValueError(
                f"class {name} of {root} has {int((labels == label).sum())} images, too few for one of them to be in "
                f"the split {split}: add images, or give other fractions"
            )
    kept = [file for file, is_in in zip(files, chosen.tolist(), strict=True) if is_in]
    return FolderSource(root, class_names=source.class_names, files=kept, passed_over=source.passed_over)
