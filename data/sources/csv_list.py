"""Lists of image files: a CSV with a path, a label and, if it has it, a split in each line."""

from __future__ import annotations

import csv as csv_module
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import IMAGE_SUFFIXES, SPLIT_NAMES, EncodedSource, Odd, file_stamp, some
from .labels import BadLabel, Label, number_labels, read_class_names, read_label, shown, tell_of_lacking
from .listing import Parts

_DELIMITERS = ("\t", ";", ",", "|")
_SNIFFED_LINES = 20
_MOST_BYTES = 1 << 30


def csv(
    path: str,
    *,
    split: str | None = None,
    eval_path: str | None = None,
    test_path: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    root: str | None = None,
    absolute: bool = False,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    delimiter: str | None = None,
    classes: str | None = None,
) -> EncodedSource:
    """Image files that a CSV lists, one a line: path, label and, if given, split; in the order of the lines.

    The first line names the columns, in any order and beside others, or is an image already: then the columns are
    path, label and, if there are three, split. In UTF-8, with or without a byte order mark.

    Args:
        path: the CSV with the training images, or with all images if it has a column of splits.
        split: None reads all lines, "train", "eval" and "test" those of the split, which may be called as folders may
            ("val", "valid", "validation").
        eval_path, test_path: CSVs with the other splits.
        eval_fraction, test_fraction, split_seed: divide the images of `path` instead, as `folder` does.
        root: the folder from which paths are given; None is that of the CSV.
        absolute: take absolute paths, and such as lead out of `root` by "..", which are refused otherwise.
        path_column, label_column, split_column: the columns' names.
        delimiter: None finds out which of tab, semicolon, comma and | it is.
        classes: a file of class names, one a line in the order of the labels. None takes the labels' words in
            alphabetical order, or their numbers.

    Raises:
        FileNotFoundError: no such CSV.
        ValueError: not a CSV of this form, a path that leads out of `root`, an image under two labels, labels that do
            not fit the classes, settings that exclude each other.
    """
    columns = (path_column, label_column, split_column)
    lists = {one: _read(Path(one), columns, delimiter) for one in (path, eval_path, test_path) if one is not None}
    by_name = any(row.split for row in lists[path])
    parts = Parts(path, eval_path, test_path, eval_fraction, test_fraction, split_seed)
    own, part, shares = parts.of(split, by_name=by_name)
    name = f"csv {own}" + (f" {part}" if part else "")

    def trained_on() -> Sequence[Label]:
        return _labels(_of_split(lists[path], "train" if by_name and split is not None else None, path))

    listed = _of_split(lists[own], part, own)
    rows = [row for row in listed if not isinstance(row.label, BadLabel)]
    odd = [Odd(f"{own}:{row.line}", str(row.label)) for row in listed if isinstance(row.label, BadLabel)]
    if not rows:
        raise ValueError(f"{name} has no image with a label: give a path and a label in each line")
    files = _Listed(Path(own), rows, Path(own).parent if root is None else Path(root), absolute=absolute)
    named = read_class_names(Path(classes)) if classes else None
    labels, names = number_labels(_labels(rows), named, trained_on, name)
    _refuse_contradictions(own, rows, labels, names)
    tell_of_lacking(labels, names, name)
    source = EncodedSource(files, np.arange(len(rows)), labels, class_names=names, name=name, odd=odd)
    return source if shares is None or split is None else source.divided(split, shares)


def csv_stamp(path: str, **settings: object) -> str:
    """Sizes and times of the CSVs and of the class names; the images' are not asked for."""
    files = [one for key in ("eval_path", "test_path", "classes") if isinstance(one := settings.get(key), str)]
    return ",".join(f"{one}:{file_stamp(one)}" for one in (path, *files))


class _Row(NamedTuple):
    line: int
    path: str
    label: Label | BadLabel
    split: str


class _Listed:
    """The listed files, as a `Store`."""

    def __init__(self, listing: Path, rows: Sequence[_Row], root: Path, *, absolute: bool) -> None:
        self._root = root
        self._paths = [row.path for row in rows]
        for row in () if absolute else rows:
            if os.path.isabs(row.path) or os.path.normpath(row.path).split(os.sep)[0] == os.pardir:
                raise ValueError(
                    f"{listing}:{row.line}: {shown(row.path)} leads out of {root}: give paths within it, another root, "
                    "or absolute=True if the list may name any file"
                )

    def read(self, row: int) -> bytes:
        return self._path(row).read_bytes()

    def where(self, row: int) -> str:
        return str(self._path(row))

    def key(self, row: int) -> str:
        return Path(self._paths[row]).as_posix()

    def stamps(self) -> Iterable[str]:
        return (f"{path} {file_stamp(self._root / path)}" for path in self._paths)

    def _path(self, row: int) -> Path:
        return self._root / self._paths[row]


def _read(path: Path, columns: tuple[str, str, str], delimiter: str | None) -> list[_Row]:
    text = _text(path)
    lines = text.splitlines()[:_SNIFFED_LINES]
    reader = csv_module.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, lines, delimiter), strict=True)
    rows: list[_Row] = []
    places: list[int | None] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if places is None:
                places, is_header = _places(path, cells, columns)
                if is_header:
                    continue
            rows.append(_row(path, reader.line_num, cells, places))
    except csv_module.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is no line of a CSV ({error}): correct it") from None
    if not rows:
        raise ValueError(f"{path} lists no images: give a path and a label in each line, as cats/1.jpg,cat")
    return rows


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: correct the path, or write path,label in each line of it")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, and a list may have {_MOST_BYTES}: divide it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _delimiter(path: Path, lines: Sequence[str], given: str | None) -> str:
    """The one by which each of the first lines has the same number of cells, two or more."""
    if given is not None:
        if len(given) != 1 or given in '"\r\n':
            raise ValueError(f"delimiter {given!r}: give one character, or none to have it found out")
        return given
    for candidate in _DELIMITERS:
        counts = {_num_cells(line, candidate) for line in lines if line.strip()}
        if len(counts) == 1 and counts.pop() > 1:
            return candidate
    for candidate in _DELIMITERS:  # quoted cells may hold line breaks, and lines be malformed
        if lines and _num_cells(lines[0], candidate) > 1:
            return candidate
    raise ValueError(
        f"{path} has no columns: separate path and label by a tab, a semicolon, a comma or |, or give the delimiter"
    )


def _num_cells(line: str, delimiter: str) -> int:
    try:
        return len(next(csv_module.reader([line], delimiter=delimiter), []))
    except csv_module.Error:  # which is told when the whole is read
        return 0


def _places(path: Path, cells: list[str], columns: tuple[str, str, str]) -> tuple[list[int | None], bool]:
    """Which cells are path, label and split, and whether this line names them."""
    names = [cell.strip().lower() for cell in cells]
    wanted = [column.strip().lower() for column in columns]
    if wanted[0] in names and wanted[1] in names:
        return [names.index(column) if column in names else None for column in wanted], True
    if len(cells) in (2, 3) and cells[0].strip().lower().endswith(IMAGE_SUFFIXES):
        return [0, 1, 2 if len(cells) == 3 else None], False
    raise ValueError(
        f"{path}: the first line {shown(', '.join(cells))} has no columns {columns[0]} and {columns[1]}, and does not "
        "begin with an image: name the columns there, or say which they are: path_column=..., label_column=..."
    )


def _row(path: Path, line: int, cells: list[str], places: list[int | None]) -> _Row:
    found = ["" if place is None else cells[place].strip() if place < len(cells) else None for place in places]
    if None in found or not found[0] or "\0" in str(found[0]):
        raise ValueError(f"{path}:{line} has no path, or fewer columns than the first line: correct it")
    image, label, split = map(str, found)
    try:
        return _Row(line, image, read_label(label), split.lower())
    except BadLabel as error:
        return _Row(line, image, error, split.lower())


def _labels(rows: Sequence[_Row]) -> list[Label]:
    return [row.label for row in rows if isinstance(row.label, int | str)]


def _of_split(rows: list[_Row], split: str | None, path: str) -> list[_Row]:
    if split is None:
        return rows
    present = {row.split for row in rows}
    unknown = sorted(present - {name for names in SPLIT_NAMES.values() for name in names})
    if unknown:
        line = next(row.line for row in rows if row.split == unknown[0])
        raise ValueError(f"{path}:{line} is of the split {shown(unknown[0])}: give train, val or test")
    called = present & set(SPLIT_NAMES[split])
    called -= set(SPLIT_NAMES["test"]) if split == "eval" and len(called) > 1 else set()
    if not called:
        raise ValueError(
            f"{path} has no images of the split {split}, and some of {some(sorted(present))}: add some, or give a path "
            "or a fraction for it"
        )
    return [row for row in rows if row.split in called]


def _refuse_contradictions(path: str, rows: Sequence[_Row], labels: np.ndarray, names: Sequence[str]) -> None:
    """A file that is listed twice counts twice, but not under two labels."""
    seen: dict[str, tuple[int, int]] = {}
    for row, label in zip(rows, labels.tolist(), strict=True):
        line, other = seen.setdefault(row.path, (row.line, label))
        if other != label:
            raise ValueError(
                f"{path}:{row.line}: {shown(row.path)} is {names[label]} here and {names[other]} in line {line}: an "
                "image has one label; remove one of the lines"
            )
