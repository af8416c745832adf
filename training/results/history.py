"""The history of a run, and its files: metrics.csv and metrics.npz.

Does not need Composer: any loop that can fill a `History` gets the same files.
"""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.whole_files import replace_file

# One row of metrics.csv. Top-1 is a fraction, the image size the side in px; images and seconds are those of training.
# data_wait_share is the share of train_seconds spent waiting for batches; files of earlier versions lack it.
EPOCH_COLUMNS = (
    "epoch",
    "train_loss",
    "train_top1",
    "eval_loss",
    "eval_top1",
    "learning_rate",
    "image_size",
    "global_batch_size",
    "images_per_second",
    "train_seconds",
    "data_wait_share",
)
STEP_COLUMNS = ("step", "epoch", "loss", "learning_rate")
_WHOLE_NUMBERS = ("epoch", "image_size", "global_batch_size")


@dataclass(frozen=True)
class History:
    """The history of a run.

    epochs: one dict per finished epoch with the keys of `EPOCH_COLUMNS`; None where a value was not measured.
    steps: lists of equal length under the names of `STEP_COLUMNS`; `step` and `epoch` count from 1.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in STEP_COLUMNS})

    def column(self, name: str) -> np.ndarray:
        """One value per epoch as float64 [E], NaN where it was not measured."""
        return np.array([number_or_nan(row.get(name)) for row in self.epochs], dtype=np.float64)


def write_metrics(history: History, folder: str | os.PathLike[str]) -> None:
    """Write metrics.csv (one row per epoch) and metrics.npz to `folder`.

    metrics.npz holds the epoch columns under their own names and `step`, `step_epoch`, `step_loss` and
    `step_learning_rate`; missing values are NaN, and no array needs `allow_pickle`.
    """
    folder = Path(folder)
    write_epochs_csv(history, folder / "metrics.csv")
    arrays = {name: history.column(name) for name in EPOCH_COLUMNS}
    arrays["epoch"] = arrays["epoch"].astype(np.int64)
    for name in STEP_COLUMNS:
        whole = name in ("step", "epoch")
        values = [value if whole else number_or_nan(value) for value in history.steps[name]]
        arrays["step" if name == "step" else f"step_{name}"] = np.array(values, dtype=np.int64 if whole else np.float64)

    def write(file: BinaryIO) -> None:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  (numpy's stub takes the arrays for allow_pickle)

    replace_file(folder / "metrics.npz", write)


def write_epochs_csv(history: History, path: str | os.PathLike[str]) -> None:
    """Write one line per epoch under a header of `EPOCH_COLUMNS`; a value that was not measured is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EPOCH_COLUMNS)
    writer.writerows([row.get(name) for name in EPOCH_COLUMNS] for row in history.epochs)
    replace_file(Path(path), lambda file: file.write(text.getvalue().encode()))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The epochs of a metrics.csv, as in `History.epochs`."""
    with open(path, newline="") as file:
        return [{name: _parse(name, value) for name, value in row.items()} for row in csv.DictReader(file)]


def number_or_nan(value: Any) -> float:
    """`value` as a float, NaN for None."""
    return math.nan if value is None else float(value)


def _parse(name: str, value: str) -> Any:
    if value == "":
        return None
    return int(value) if name in _WHOLE_NUMBERS else float(value)
