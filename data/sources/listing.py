"""Which files a source is made of: a path, a pattern, or a folder with a part of the data in some of its files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from .base import SPLIT_NAMES, Shares, check_split, file_stamp

MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether it has a scheme, as https://."""
    return _URL.match(path) is not None


def expanded(pattern: str) -> list[str]:
    """`pattern` with each {000..012} and {a,b} written out, in order. Raises ValueError for more than `MOST_FILES`."""
    done: list[str] = [""]
    position = 0
    for found in _BRACES.finditer(pattern):
        choices = _choices(found[1], pattern, MOST_FILES // len(done))
        done = [f"{start}{pattern[position : found.start()]}{choice}" for start in done for choice in choices]
        position = found.end()
    if set(pattern[position:]) & set("{}"):
        raise ValueError(f"{pattern}: a brace is not closed, or within another; write {{000..012}} or {{a,b}}")
    return [start + pattern[position:] for start in done]


def list_files(path: str, split: str | None, *, suffixes: Sequence[str]) -> list[Path]:
    """The local files that `path` stands for: a file, a pattern with braces and * ? [], or a folder.

    Of a folder, its files with one of `suffixes` at any depth: for None all of them, else those of the split by their
    names, as train-00000.tar or val/0001.tar (see `choose`). In alphabetical order.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a malformed pattern.
    """
    if Path(path).is_dir():
        inside = sorted(p for suffix in suffixes for p in Path(path).rglob(f"*{suffix}") if p.is_file())
        names = [p.relative_to(path).as_posix() for p in inside]
        chosen = choose(names, split) if split is not None else names
        if not chosen:
            of = f" of the split {split}" if split is not None and names else ""
            raise FileNotFoundError(
                f"no files {' or '.join(f'*{suffix}' for suffix in suffixes)}{of} in the folder {path}: correct the "
                f"path, or give a pattern in its place, as {path}/train-*{suffixes[0]}"
            )
        return [Path(path, name) for name in chosen]
    found = [one for part in ([path] if Path(path).is_file() else expanded(path)) for one in _matches(part)]
    return list(dict.fromkeys(found))  # two patterns may match a file


def choose(names: Iterable[str], split: str) -> list[str]:
    """Those of the files whose name, or a folder's of it, begins with the split's name, as Hugging Face does.

    An evaluation split is the first that is there of val, valid, validation, eval and test.
    """
    check_split(split)
    names = list(names)
    for word in SPLIT_NAMES[split]:
        said = re.compile(rf"(?:^|.*[-_.]){word}(?:[-_.\d].*)?$", re.IGNORECASE)
        if chosen := [name for name in names if any(said.match(part) for part in PurePosixPath(name).parts)]:
            return chosen
    return []


def stamp_of(paths: Iterable[str | Path]) -> str:
    """Names, sizes and times of local files, as text."""
    return ",".join(f"{Path(path).name}:{file_stamp(path)}" for path in paths)


class Parts:
    """Which path has the images of a split, and whether they are to be divided.

    Args:
        path: of the training images, or a folder whose files say of which split they are.
        eval_path, test_path: of the other splits; None looks for them in the folder `path`.
        eval_fraction, test_fraction, split_seed: divide the images of `path` instead; see `folder`.

    Raises:
        ValueError: two ways at once, or a fraction out of range.
    """

    def __init__(
        self,
        path: str,
        eval_path: str | None,
        test_path: str | None,
        eval_fraction: float | None,
        test_fraction: float,
        split_seed: int,
    ) -> None:
        for name, other, fraction in (
            ("eval", eval_path, eval_fraction),
            ("test", test_path, test_fraction or None),
        ):
            if other is not None and fraction is not None:
                raise ValueError(f"{name}_path {other} beside {name}_fraction {fraction}: give one of them")
        if test_fraction and eval_fraction is None:
            raise ValueError(f"test_fraction {test_fraction} without an eval_fraction: give both")
        self._path, self._others = path, {"eval": eval_path, "test": test_path}
        self._shares = None if eval_fraction is None else Shares(eval_fraction, test_fraction, split_seed)
        self._divides_test = test_fraction > 0

    def of(self, split: str | None, *, by_name: bool) -> tuple[str, str | None, Shares | None]:
        """The path with the images of `split`, the split of which its files are to be, and how to divide the images.

        by_name: whether `path` holds several splits, told apart by names in it.

        Raises:
            ValueError: nothing says where the split is.
        """
        if split is None:
            return self._path, None, None
        check_split(split)
        of_training = "train" if by_name else None
        if self._shares is not None and (split != "test" or self._divides_test):
            return self._path, of_training, self._shares
        other = self._others.get(split)
        if other is not None:
            return other, None, None
        if split == "train":
            return self._path, of_training, None
        if by_name:
            return self._path, split, None
        raise ValueError(
            f"{self._path} says nothing of the split {split}: give {split}_path, or {split}_fraction, as 0.1"
        )


def _choices(inner: str, pattern: str, most: int) -> list[str]:
    bounds = _RANGE.fullmatch(inner)
    if bounds is None:
        choices = inner.split(",")
        if len(choices) < 2:
            raise ValueError(f"{pattern}: {{{inner}}} is neither a range nor a choice; write {{000..012}} or {{a,b}}")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise ValueError(f"{pattern}: {{{inner}}} runs backwards; write {{{bounds[2]}..{bounds[1]}}}")
        if last - first >= most:
            raise ValueError(f"{pattern} stands for more than {MOST_FILES:,} files: give a shorter range")
        choices = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    if len(choices) > most:
        raise ValueError(f"{pattern} stands for more than {MOST_FILES:,} files: give a shorter range")
    return choices


def _matches(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    found = sorted(Path(one) for one in glob.glob(path, recursive=True) if Path(one).is_file())
    if not found:
        raise FileNotFoundError(f"no file {path}: correct the path or the pattern, or put the data there")
    return found
