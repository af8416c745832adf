"""Reads what a finished run has left in its folder."""

from __future__ import annotations

import csv
import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from training.results.history import STEP_COLUMNS, History, read_metrics

PICTURES = ("confusion", "mistakes", "calibration", "sizes")  # of evaluation/, in the order of the page
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CONTINUE = "continue the run with load=latest, which writes it again"
# What the page formats as numbers. Each may be null or absent.
_SUMMARY_NUMBERS = (
    "top1", "best_top1", "loss", "epochs", "seconds", "train_seconds", "images_per_second", "forward_macs",
    "parameters",
)  # fmt: skip
_EVALUATION_NUMBERS = (
    "images", "classes", "image_size", "top1", "top5", "balanced", "loss", "calibration_error", "shift_consistency",
    "seconds",
)  # fmt: skip
_EVALUATION_ROWS = {
    "sizes": ("image_size", "top1", "top5", "loss"),
    "worst_classes": ("recall", "precision", "images"),
    "mistakes": ("index", "confidence"),
}


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder describes it.

    evaluation: the contents of evaluation/evaluation.json; None: the run was not evaluated on its own.
    pictures: name -> the bytes of evaluation/NAME.png, of those that are there.
    """

    folder: Path
    history: History
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    recipe_text: str
    evaluation: Mapping[str, Any] | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.summary.get("run_name") or self.folder.name)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises ValueError, with one line for the user, if it is no finished run or a file of it is damaged.
    """
    recipe_text, settings = _read_recipe(folder)
    epochs = _read_epochs(folder)
    summary = _read_summary(folder, epochs_done=len(epochs), settings=settings)
    history = History(epochs, _read_steps(folder))
    evaluation, pictures = _read_evaluation(folder / "evaluation")
    return Run(folder, history, summary, settings, recipe_text, evaluation, pictures)


def read_comparison(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Label -> summary of compare.json, which `run.py --compare` writes; empty if there is none."""
    path = folder / "compare.json"
    if not path.is_file():
        return {}
    runs = _read_mapping(path, repair="remove it, or compare again").get("runs")
    if not isinstance(runs, dict) or not all(isinstance(summary, dict) for summary in runs.values()):
        raise ValueError(f"{path} is damaged (its runs are no summaries); remove it, or compare again")
    return runs


def evaluate_command(folder: Path) -> str:
    """The command that fills a run's evaluation/."""
    return f"python evaluate.py {shlex.quote(str(folder))}"


def _read_recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run; give a run's folder, as results/digits_medium")
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} has no recipe.yaml, so it is no run's folder; give results/RUN")
    try:
        text = path.read_text()
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({_in_one_line(error)}); train that run again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged (it holds no settings); train that run again")
    return text, settings


def _read_epochs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no metrics.csv: the run is in its first epoch, or stopped there; wait for its end, or train "
            "it again"
        )
    try:
        epochs = read_metrics(path)
        for row in epochs:
            _ = [float(value) for value in row.values() if value is not None]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({_in_one_line(error)}); {_CONTINUE}") from None
    if not epochs or any(row.get("epoch") is None for row in epochs):
        raise ValueError(f"{path} is damaged (it holds no epochs, or rows without one); {_CONTINUE}")
    return epochs


def _read_steps(folder: Path) -> dict[str, list[Any]]:
    """The steps of metrics.npz; none if it is not there."""
    path = folder / "metrics.npz"
    steps: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
    if not path.is_file():
        return steps
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in STEP_COLUMNS:
                steps[name] = arrays["step" if name == "step" else f"step_{name}"].tolist()
    except (ValueError, KeyError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({_in_one_line(error)}); {_CONTINUE}") from None
    return steps


def _read_summary(folder: Path, *, epochs_done: int, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    path = folder / "summary.json"
    under_way = "is under way, or was stopped; wait for its end, or continue it with load=latest"
    if not path.is_file():
        duration = settings.get("duration")
        planned = duration.get("epochs") if isinstance(duration, dict) else None
        so_far = f"{epochs_done} of {planned}" if planned else f"{epochs_done}"
        raise ValueError(f"{folder} has no summary.json: after {so_far} epochs the run {under_way}")
    summary = _read_mapping(path, repair=_CONTINUE)
    _check_numbers(summary, _SUMMARY_NUMBERS, path=path, repair=_CONTINUE)
    for name in ("test", "hardware", "versions", "algorithms"):
        if not isinstance(summary.get(name), (dict, type(None))):
            raise ValueError(f"{path} is damaged ({name} is {summary[name]!r}, and must be a mapping); {_CONTINUE}")
    _check_numbers(summary.get("test") or {}, ("top1", "loss"), path=path, repair=_CONTINUE)
    if summary.get("epochs") != epochs_done:
        raise ValueError(
            f"{path} is about {summary.get('epochs')} epochs, and metrics.csv has {epochs_done}: the run {under_way}"
        )
    return summary


def _read_evaluation(folder: Path) -> tuple[Mapping[str, Any] | None, dict[str, bytes]]:
    """The contents of evaluation.json, None if there is none, and the pictures beside it."""
    path, repair = folder / "evaluation.json", f"make it again: {evaluate_command(folder.parent)}"
    evaluation = _read_mapping(path, repair=repair) if path.is_file() else None
    if evaluation is not None:
        _check_numbers(evaluation, _EVALUATION_NUMBERS, path=path, repair=repair)
        for name, numbers in _EVALUATION_ROWS.items():
            rows = evaluation.get(name)
            if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise ValueError(f"{path} is damaged ({name} is no list of rows); {repair}")
            for row in rows or ():
                _check_numbers(row, numbers, path=path, repair=repair)
    paths = {name: folder / f"{name}.png" for name in PICTURES}
    pictures = {name: picture.read_bytes() for name, picture in paths.items() if picture.is_file()}
    for name, content in pictures.items():
        if not content.startswith(_PNG_SIGNATURE):
            raise ValueError(f"{paths[name]} is damaged (no PNG file); {repair}")
    return evaluation, pictures


def _read_mapping(path: Path, *, repair: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_in_one_line(error)}); {repair}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no mapping); {repair}")
    return content


def _check_numbers(values: Mapping[str, Any], names: Sequence[str], *, path: Path, repair: str) -> None:
    for name in names:
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{path} is damaged ({name} is {value!r}, and must be a number or null); {repair}")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
