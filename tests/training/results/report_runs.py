"""Folders of runs for the tests of the report page, without training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from training.recipe import load_recipe
from training.results.history import EPOCH_COLUMNS, STEP_COLUMNS, History, write_metrics
from training.results.summary import summarize, write_json

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
EVALUATION = {
    "run_name": "digits", "checkpoint": "best.pt", "averaged": True, "split": "eval", "images": 359, "classes": 10,
    "image_size": 20, "flip": False, "top1": 0.9721, "top5": None, "loss": 0.21, "calibration_error": 0.0123,
    "shift_consistency": 0.981, "seconds": 1.5,
    "sizes": [{"image_size": px, "top1": top1, "top5": None, "loss": 0.3} for px, top1 in ((16, 0.9513), (20, 0.97))],
    "worst_classes": [{"class": "eight", "recall": 0.9123, "precision": 0.99, "images": 35, "mistaken_for": "three"}],
    "mistakes": [{"index": index, "label": "eight", "predicted": "three", "confidence": 0.9} for index in range(23)],
}  # fmt: skip


def make_history(*, epochs: int = 6, top1: float = 0.9, seconds: float = 2.0) -> History:
    history = History()
    for epoch in range(1, epochs + 1):
        for index in range(5):
            step = ((epoch - 1) * 5 + index + 1, epoch, 2.0 / epoch, 0.1 * epoch)
            for name, value in zip(STEP_COLUMNS, step, strict=True):
                history.steps[name].append(value)
        size = 16 if epoch <= epochs // 2 else 32
        row = (epoch, 2.0 / epoch, 0.1 * epoch, 2.5 / epoch, top1 - 0.3 / epoch, 0.4, size, 64, 1000.0 / epoch, seconds)
        row = (*row, None)  # data_wait_share, as in runs from before it was measured
        history.epochs.append(dict(zip(EPOCH_COLUMNS, row, strict=True)))
    return history


def make_run(
    folder: Path, *overrides: str, history: History | None = None, seconds: float = 20.0, **summary: Any
) -> Path:
    """The folder of a finished run of the digits recipe with `overrides`, named as the folder; returns the folder."""
    recipe = load_recipe(DIGITS, [f"run_name={folder.name}", *overrides])
    history = history or make_history()
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe.settings))
    write_metrics(history, folder)
    about = {"run_name": folder.name, "parameters": 12345, "seed": 7, "algorithms": recipe.algorithms}
    write_json({**summarize(history, seconds=seconds, **about), **summary}, folder / "summary.json")
    return folder


def add_evaluation(run: Path, **changes: Any) -> None:
    write_json({**EVALUATION, **changes}, run / "evaluation" / "evaluation.json")
    for name in ("confusion", "mistakes", "calibration", "sizes"):
        (run / "evaluation" / f"{name}.png").write_bytes(png())


def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (640, 480), (200, 30, 30)).save(file, format="PNG")
    return file.getvalue()
