"""Hugging Face data sets: images in Parquet or Arrow files, from this disk or the Hub. Runs none of their scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import EncodedSource, Odd
from .labels import (
    BadLabel,
    Label,
    checked,
    checked_names,
    number_labels,
    read_class_names,
    read_label,
    tell_of_lacking,
)
from .listing import Parts, list_files, stamp_of
from .tables import SUFFIXES, Tables


def hf(
    path: str,
    *,
    split: str | None = None,
    eval_path: str | None = None,
    test_path: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    image: str = "image",
    label: str = "label",
    classes: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    download: bool = True,
) -> EncodedSource:
    """Images in tables: Parquet files, Arrow files as `save_to_disk` writes, or the Parquet files of a data set's id.

    Images are in the order of the files, and in these in that of the rows. No script of a data set is run, nothing is
    unpickled, and a path in a table is not followed.

    Args:
        path: of the training images: a file, a pattern as `data/train-*.parquet`, a folder whose files or folders are
            named after their split, as train-00000-of-00004.parquet or val/data-00000-of-00001.arrow, or the id of a
            data set on the Hub, as uoft-cs/cifar10.
        split: None reads all of `path`, "train", "eval" and "test" their part.
        eval_path, test_path: the same for the other splits.
        eval_fraction, test_fraction, split_seed: divide the images of `path` instead, as `folder` does.
        image: the column of the images, {bytes, path} or bytes.
        label: the column of the labels, numbers or words.
        classes: a file of class names, one a line in the order of the labels. None takes those of the ClassLabel that
            the file's schema has; without one, the labels' words, or their numbers.
        config: the folder of the configuration in a data set that has several.
        revision: a commit, branch or tag of the data set on the Hub; `refs/convert/parquet` has the Parquet files that
            the Hub makes of most data sets.
        download: False uses what is in the Hub's cache alone.

    Raises:
        FileNotFoundError: no such files, or the data set cannot be downloaded.
        ValueError: damaged files, other columns, labels that do not fit the classes, settings that exclude each other.
        ModuleNotFoundError: pyarrow, or for an id huggingface_hub, is not installed.
    """
    root = _root(path, config, revision, download)
    others = [None if one is None else _root(one, config, revision, download) for one in (eval_path, test_path)]
    parts = Parts(root, others[0], others[1], eval_fraction, test_fraction, split_seed)
    by_name = Path(root).is_dir()
    own, part, shares = parts.of(split, by_name=by_name)
    tables = Tables(list_files(own, part, suffixes=SUFFIXES), image, label)
    named = read_class_names(Path(classes)) if classes else _class_names(tables, label)
    name = f"hf {path if own == root else own}" + (f" {part}" if part else "")

    def trained_on() -> Sequence[Label]:
        training, its_part, _ = parts.of("train" if by_name and split is not None else None, by_name=by_name)
        return _labels(Tables(list_files(training, its_part, suffixes=SUFFIXES), image, label), [])[1]

    odd: list[Odd] = []
    rows, given = _labels(tables, odd)
    if not given:
        raise ValueError(f"{name} has no image with a label: give the column of the labels: label=...")
    labels, names = number_labels(given, named, trained_on, name)
    tell_of_lacking(labels, names, name)
    source = EncodedSource(tables, np.array(rows, np.int64), labels, class_names=names, name=name, odd=odd)
    return source if shares is None or split is None else source.divided(split, shares)


def hf_stamp(path: str, **settings: object) -> str:
    """Sizes and times of the local files of every split; "" for a data set on the Hub."""
    found: list[Path] = []
    for one in (path, settings.get("eval_path"), settings.get("test_path")):
        if isinstance(one, str) and _is_local(one):
            found += list_files(one, None, suffixes=SUFFIXES)
    classes = settings.get("classes")
    return stamp_of([*found, *([classes] if isinstance(classes, str) else [])])


def _is_local(path: str) -> bool:
    is_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not set(path) & set("*?[]{}\\")
    return Path(path).exists() or path.endswith(SUFFIXES) or not is_id


def _root(path: str, config: str | None, revision: str | None, download: bool) -> str:
    if _is_local(path):
        if revision is not None:
            raise ValueError(f"revision {revision} beside {path}, which is on this disk: leave it out")
        return str(Path(path, config)) if config is not None else path
    from .hub import downloaded

    folder = downloaded(path, revision=revision, config=config, suffixes=SUFFIXES, download=download)
    return str(folder if config is None else folder / config)


def _class_names(tables: Tables, column: str) -> tuple[str, ...] | None:
    """Those of the ClassLabel in what `datasets` writes into a schema; the same in every file."""
    found = {_names_in(metadata, column) for metadata in tables.descriptions()}
    if len(found) > 1:
        raise ValueError(f"{tables.name} has files whose class names differ: give files of one data set, or classes")
    names = found.pop()
    return None if names is None else checked_names(names, tables.name)


def _names_in(metadata: bytes | None, column: str) -> tuple[str, ...] | None:
    try:
        found: Any = json.loads(metadata or b"null")
        names = found["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _labels(tables: Tables, odd: list[Odd]) -> tuple[list[int], list[Label]]:
    """Rows that have a label, and the labels; the other rows become odd."""
    rows, labels = [], []
    for row, value in enumerate(tables.labels()):
        try:
            if value is None:
                raise BadLabel("it has no label")
            labels.append(read_label(value) if isinstance(value, str) else checked(value))
            rows.append(row)
        except BadLabel as error:
            odd.append(Odd(tables.where(row), str(error)))
    return rows, labels
