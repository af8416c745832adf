"""The result of a run, its machine and its versions: summary.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.whole_files import replace_file
from training.results.history import History

_DISTRIBUTIONS = {
    "torch": "torch",
    "composer": "mosaicml",
    "ffcv": "ffcv",
    "numpy": "numpy",
    "torchvision": "torchvision",
    "brisk-vision": "brisk-vision",
}


def summarize(
    history: History,
    *,
    run_name: str,
    seconds: float,
    parameters: int,
    seed: int | None,
    algorithms: Mapping[str, Any],
    world_size: int = 1,
    resumed: bool = False,
    forward_macs: float | None = None,
) -> dict[str, Any]:
    """The contents of a run's summary.json.

    top1 and loss are those of the last evaluation, best_top1 is the highest of all. A run with a test split adds
    `test`: the checkpoint's name, its top1 and its loss there. `seconds` is the wall time of the whole run as measured
    by the caller; train_seconds is that of training alone, over all sessions of a resumed run.

    parameters: number of scalars in the model's parameters.
    algorithms: name -> settings of every algorithm that acted.
    forward_macs: multiply-adds of all the run's training forward passes, if known.
    """
    top1 = history.column("eval_top1")
    measured_top1 = top1[np.isfinite(top1)]
    return {
        "run_name": run_name,
        "top1": _last_measured(history, "eval_top1"),
        "best_top1": float(measured_top1.max()) if measured_top1.size else None,
        "loss": _last_measured(history, "eval_loss"),
        "epochs": len(history.epochs),
        "seconds": seconds,
        "train_seconds": float(np.nansum(history.column("train_seconds"))),
        "images_per_second": _mean_images_per_second(history),
        "forward_macs": forward_macs,
        "parameters": parameters,
        "seed": seed,
        "world_size": world_size,
        "resumed": resumed,
        "algorithms": dict(algorithms),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def write_json(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `data` as strict JSON: numbers that JSON cannot represent (NaN, infinity) become null."""
    text = json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"
    replace_file(Path(path), lambda file: file.write(text.encode()))


def _plain(value: Any) -> Any:
    """`value` in JSON types. Anything but numbers, text, lists and mappings becomes its str()."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _last_measured(history: History, name: str) -> float | None:
    """The last epoch's value that is not missing. NaN counts as a value: skipping it would hide a failure."""
    values = [row[name] for row in history.epochs if row.get(name) is not None]
    return float(values[-1]) if values else None


def _mean_images_per_second(history: History) -> float | None:
    seconds, rate = history.column("train_seconds"), history.column("images_per_second")
    measured = np.isfinite(seconds) & np.isfinite(rate) & (seconds > 0)
    if not measured.any():
        return None
    return float((seconds * rate)[measured].sum() / seconds[measured].sum())


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _hardware() -> dict[str, Any]:
    import torch

    gpus: dict[str, int] = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            gpus[name] = gpus.get(name, 0) + 1
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "gpu_count": sum(gpus.values()),
        "memory_gb": _memory_gb(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or None


def _memory_gb() -> float | None:
    try:
        size_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
    return round(size_bytes / 1e9, 1)
