"""Every export is loaded again by another process, with the code of its own model card, and compared."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from training.exporting.formats import Written
from training.exporting.graphs import other_size
from training.exporting.samples import TOLERANCE, Samples, largest_difference, logits_of
from training.trained import Trained

_ROOT = Path(__file__).parents[2]
_RELOAD = Path(__file__).with_name("reload.py")
_TIMEOUT_SECONDS = 600


class NotTheSame(RuntimeError):
    """An export that cannot be loaded, or whose logits are not the network's."""


def check_export(folder: Path, written: Written, trained: Trained, samples: Samples) -> float:
    """Load the export in a process of its own; returns the largest difference of its logits.

    It gets the samples, one image alone, and where it takes any size all of them at another. The process cannot import
    this project, unless the export says that it needs it.

    Raises NotTheSame.
    """
    given = {"samples": samples.images, "one": samples.images[:1]}
    if written.any_size:
        given["other_size"] = other_size(samples.images)
    logits = _logits_of_export(folder, written, given)
    differences = {
        name: largest_difference(logits_of(trained.network, images), logits[name]) for name, images in given.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > TOLERANCE:
        raise NotTheSame(
            f"the export's logits differ from the network's by {differences[worst]:.2g} ({worst.replace('_', ' ')}), "
            f"and {TOLERANCE:g} is the limit; nothing was written: take another format with --to"
        )
    return differences[worst]


def _logits_of_export(folder: Path, written: Written, given: dict[str, Tensor]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        code, images, result = (Path(scratch, name) for name in ("code.py", "given.npz", "result.npz"))
        code.write_text(written.code, encoding="utf-8")
        arrays: dict[str, Any] = {name: value.numpy() for name, value in given.items()}
        np.savez(images, **arrays)
        command = [sys.executable, "-I", str(_RELOAD), str(code), str(images), str(result), written.arrays]
        command += [str(_ROOT)] if written.needs_project else []
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise NotTheSame(f"the export was not loaded within {_TIMEOUT_SECONDS} s; nothing was written") from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise NotTheSame(f"the export cannot be loaded again ({said[-1] if said else done.returncode})")
        with np.load(result) as logits:
            return {name: logits[name] for name in logits.files}
