"""What sources are made of: the protocols, images in memory, encoded images anywhere, the division into splits."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..draws import Operation, random_bits
from .image_file import UnusableImage, open_image, rgb_pixels

log = logging.getLogger(__name__)

SPLITS = ("train", "eval", "test")
# What the parts of a data set are called on disk, in the order in which they are looked for.
SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Of an encoded image, which is read before anything is known of it: what MOST_PIXELS take at 16 bits a channel.
MOST_FILE_BYTES = 1 << 29
_SHOWN_NAMES = 5


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
    """A source of encoded images, such as JPEG files, which can be stored without being encoded again."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError, or UnusableImage with the reason."""
        ...

    def where(self, index: int) -> str:
        """Where the encoded image is, for messages and reports."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether its images changed, so that an interrupted conversion of it can go on."""

    def fingerprint(self) -> str:
        """A string that changes when an image, a label or their order does."""
        ...


class Odd(NamedTuple):
    """Something in a source that is no usable image, found before any image is read."""

    where: str
    reason: str


class Store(Protocol):
    """Where the encoded images of an `EncodedSource` are. Can be pickled, and read by several threads at once."""

    def read(self, row: int) -> bytes:
        """As `FileSource.read`."""
        ...

    def where(self, row: int) -> str:
        """As `FileSource.where`."""
        ...

    def key(self, row: int) -> str:
        """A name that stays when the data are moved or others are added: it decides in which split the image is."""
        ...

    def stamps(self) -> Iterable[str]:
        """Strings of which one changes when an image does, as far as is visible without reading them."""
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

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.name, self.class_names)).encode())
        digest.update(np.asarray(self._labels).astype("<i8").tobytes())
        for image in self._images:
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()


class EncodedSource:
    """Encoded images in a store, with a label each.

    Attributes:
        odd: what was found in the store besides usable images.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        labels: np.ndarray,
        *,
        class_names: tuple[str, ...],
        name: str,
        odd: Sequence[Odd] = (),
    ) -> None:
        self.name = name
        self.class_names = class_names
        self.odd = tuple(odd)
        self._store = store
        self._rows = rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        return self._store.read(int(self._rows[index]))

    def where(self, index: int) -> str:
        return self._store.where(int(self._rows[index]))

    def image(self, index: int) -> np.ndarray:
        return decoded(self, index)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.name, self.class_names, self.odd)).encode(errors="surrogateescape"))
        for array in (self._rows, self._labels):
            digest.update(array.astype("<i8").tobytes())
        for stamp in self._store.stamps():
            digest.update(stamp.encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def divided(self, split: str, shares: Shares) -> EncodedSource:
        """The images of one split. Raises ValueError for a class too small to be divided."""
        keys = hashed([self._store.key(int(row)) for row in self._rows])
        chosen = shares.members(keys, self._labels, split)
        refuse_undivided(self.name, self.class_names, self._labels, chosen, split)
        return EncodedSource(
            self._store,
            self._rows[chosen],
            self._labels[chosen],
            class_names=self.class_names,
            name=f"{self.name} {split}",
            odd=self.odd if split == "train" else (),
        )


class Shares:
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
        check_split(split)
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


def check_split(split: str, allowed: Sequence[str] = SPLITS) -> None:
    """Raise ValueError unless `split` is one of `allowed`."""
    if split not in allowed:
        raise ValueError(f"split {split!r}: give one of {', '.join(allowed)}")


def decoded(source: FileSource, index: int) -> np.ndarray:
    """uint8 [height, width, 3]: image `index`, as `Source.image` gives it. Raises ValueError if it cannot be read."""
    try:
        return rgb_pixels(open_image(source.read(index)))
    except (OSError, UnusableImage) as error:
        where = source.where(index)
        raise ValueError(f"{where} cannot be read as an image ({error}): repair or remove the file") from error


def hashed(names: Iterable[str]) -> np.ndarray:
    """uint64: a hash of each name, which does not depend on the others."""
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def refuse_undivided(what: str, class_names: Sequence[str], labels: np.ndarray, chosen: np.ndarray, split: str) -> None:
    """Raise ValueError if the `chosen` have no image of a class that has some."""
    for label in np.unique(labels):
        if not chosen[labels == label].any():
            raise ValueError(
                f"class {class_names[label]} of {what} has {int((labels == label).sum())} images, too few for one of "
                f"them to be in the split {split}: add images, or give other fractions"
            )


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of the last change of a file, as text."""
    try:
        status = os.stat(path)
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"


@cache
def say_once(text: str) -> None:
    """Log a warning, once in a process."""
    log.warning("%s", text)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def odd_of(source: Source) -> tuple[Odd, ...]:
    """What was found in a source besides usable images, before any was read."""
    return source.odd if isinstance(source, EncodedSource) else ()
