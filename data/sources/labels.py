"""Labels as people write them, numbers or words, and the names of the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .base import say_once, some

Label = int | str
MOST_CLASSES = 1_000_000  # a damaged or hostile label would ask for as many names
_MOST_BYTES = 64 << 20  # of a file of names
_MOST_SHOWN = 60  # characters of somebody's label in a message


class BadLabel(ValueError):
    """A label that is none; the message is the reason."""


def read_label(text: str) -> Label:
    """A label from text: a number if it is one. Raises BadLabel if it is empty, negative or absurdly large."""
    text = text.strip()
    if not text:
        raise BadLabel("its label is empty")
    if text.isascii() and text.removeprefix("-").isdigit():
        return checked(int(text[:20]))
    if len(text) > 1000 or not text.isprintable():
        raise BadLabel(f"its label {shown(text)} is no name of a class")
    return text


def checked(number: int) -> int:
    """`number` as a label. Raises BadLabel if it is negative or absurdly large."""
    if number < 0:
        raise BadLabel(f"its label is {number}; labels count from 0")
    if number >= MOST_CLASSES:
        raise BadLabel(f"its label is {number}, and {MOST_CLASSES:,} classes are the most")
    return number


def shown(value: object) -> str:
    """Somebody's value, for a message of one line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def read_class_names(path: Path) -> tuple[str, ...]:
    """A file of class names, one a line in the order of the labels, in UTF-8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text, no names, too many, or one twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} of class names: write one a line there, in the order of the labels")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES >> 20} MiB: give a file with a class name in each line")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    return checked_names(names, str(path))


def checked_names(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    """`names`, which `what` gives. Raises ValueError if there are none, too many, or one is there twice."""
    if not 0 < len(names) <= MOST_CLASSES:
        raise ValueError(f"{what} has {len(names)} class names: give 1 to {MOST_CLASSES:,}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} has the class name {shown(name)} twice: give each class a name of its own")
        seen.add(name)
    return names


def number_labels(
    given: Sequence[Label], names: tuple[str, ...] | None, trained_on: Callable[[], Sequence[Label]], what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [N] indices of the classes, and the classes' names.

    Args:
        given: the labels of `what`.
        names: of the classes, in the order of their numbers. None takes the words that are used as labels, in
            alphabetical order, or the numbers from 0 to the largest.
        trained_on: gives the labels of the training images; the names come from them.

    Raises:
        ValueError: words among numbers, or a label without a name.
    """
    names = names or _names_in(trained_on(), what)
    if given and isinstance(given[0], int):
        words = next((label for label in given if not isinstance(label, int)), None)
        numbers = None if words is not None else np.array(given, dtype=np.int64)
    else:
        index = {name: number for number, name in enumerate(names)}
        words = next((label for label in given if label not in index), None)
        numbers = None if words is not None else np.array([index[str(label)] for label in given], dtype=np.int64)
    if numbers is None:
        raise ValueError(
            f"{what} has the label {shown(words)}, and the {len(names)} classes are {shown(', '.join(names))}: correct "
            "it, or give the names of all classes"
        )
    if len(numbers) and numbers.max() >= len(names):
        raise ValueError(
            f"{what} has the label {numbers.max()}, and there are {len(names)} classes, numbered from 0: correct it, "
            "or give the names of all classes"
        )
    return numbers, names


def tell_of_lacking(labels: np.ndarray, class_names: Sequence[str], what: str) -> None:
    """Warn, once, of classes without an image."""
    counts = np.bincount(labels, minlength=len(class_names))
    lacking = [name for name, count in zip(class_names, counts.tolist(), strict=True) if not count]
    if lacking:
        say_once(f"{what}: no images of {some(lacking)}; the other {len(class_names) - len(lacking)} classes are there")


def _names_in(labels: Sequence[Label], what: str) -> tuple[str, ...]:
    words = {label for label in labels if isinstance(label, str)}
    if not words:
        return tuple(map(str, range(max((label for label in labels if isinstance(label, int)), default=-1) + 1)))
    number = next((label for label in labels if isinstance(label, int)), None)
    if number is not None:
        raise ValueError(
            f"{what} has numbers and words as labels, as {number} and {shown(min(words))}: write all of them in one way"
        )
    return tuple(sorted(words))
