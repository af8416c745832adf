"""Pictures show what they are given, however many classes there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.judging.pictures import draw_confusion


@pytest.mark.parametrize("classes", [10, 126, 1000])
def test_every_cell_of_a_confusion_matrix_is_seen(classes: int, tmp_path: Path) -> None:
    """A diagonal is an unbroken line from corner to corner: no class falls between two pixels."""
    names = [f"class {number}" for number in range(classes)]
    pairs = [{"class": "class 1", "predicted": "class 2", "images": 3}]
    draw_confusion(np.eye(classes, dtype=int) * 3, names, pairs, tmp_path / "eye.png")
    draw_confusion(np.zeros((classes, classes), int), names, pairs, tmp_path / "none.png")
    with Image.open(tmp_path / "eye.png") as eye, Image.open(tmp_path / "none.png") as none:
        left = slice(0, int(eye.width * 0.45))  # without the color bar
        changed = np.abs(np.asarray(eye.convert("L"), int) - np.asarray(none.convert("L"), int))[:, left] > 60
    rows = np.flatnonzero(changed.any(axis=1))
    assert rows[-1] - rows[0] + 1 == len(rows)  # no row of pixels within the matrix without one
    assert len(rows) > 500
