"""Trains a recipe as run.py does and writes what each phase took: `recipe_run OUT.json -f RECIPE.yaml [key=value ...]`.

A phase is an image size. Its loader share is the part of the training time in which the step waited for the next
batch; run.py's own files hold the rest. Exit status as run.py's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Run the recipe of `arguments[1:]`; write its phases to `arguments[0]`."""
    started = time.monotonic()
    from training.engines.lean_import import import_lean

    import_lean()  # as the command line does, before Composer is imported for the first time
    from training import cli
    from training.engines import composer as engine

    meter = _make_meter()
    build_callbacks = engine.build_callbacks

    def with_meter(*given: Any, **named: Any) -> list[Any]:
        return [*build_callbacks(*given, **named), meter]

    engine.build_callbacks = with_meter
    status = cli.main(arguments[1:])
    about = {"seconds": time.monotonic() - started, "until_first_step_seconds": meter.began - started}
    Path(arguments[0]).write_text(json.dumps({**about, "phases": phases(meter.epochs)}))
    return status


def phases(epochs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per image size, of its epochs after the first, which also tunes and compiles kernels; if there is only
    one, of that one.

    epochs: image_size, batch_size, images, train_seconds, wait_seconds and peak_bytes of each, in order.
    """
    found: dict[int, list[Mapping[str, Any]]] = {}
    for epoch in epochs:
        found.setdefault(epoch["image_size"], []).append(epoch)
    return [_phase(size, of_size) for size, of_size in found.items()]


def _phase(size: int, epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    warm = epochs[1:] or epochs
    seconds = sum(epoch["train_seconds"] for epoch in warm)
    peaks = [epoch["peak_bytes"] for epoch in epochs if epoch["peak_bytes"] is not None]
    return {
        "image_size": size,
        "batch_size": warm[0]["batch_size"],
        "steps": sum(epoch["steps"] for epoch in warm),
        "with_first_epoch": len(epochs) == 1,
        "images_per_second": sum(epoch["images"] for epoch in warm) / seconds,
        "loader_share": sum(epoch["wait_seconds"] for epoch in warm) / seconds,
        "peak_memory_gb": max(peaks) / 1e9 if peaks else None,
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
    }


def _make_meter() -> Any:
    import torch
    from composer.core import Callback, State
    from composer.loggers import Logger

    class Meter(Callback):
        """Times every epoch as the recorder does, and within it the waiting for batches."""

        def __init__(self) -> None:
            self.epochs: list[dict[str, Any]] = []
            self.began = time.monotonic()

        def epoch_start(self, state: State, logger: Logger) -> None:
            if not self.epochs:
                self.began = time.monotonic()
            loader: Any = state.train_dataloader
            about = {"image_size": loader.image_size, "batch_size": loader.batch_size, "images": 0, "steps": 0}
            self.epochs.append({**about, "wait_seconds": 0.0, "train_seconds": 0.0, "peak_bytes": None})
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._since = time.monotonic()

        def before_dataloader(self, state: State, logger: Logger) -> None:
            self._asked = time.monotonic()

        def after_dataloader(self, state: State, logger: Logger) -> None:
            self.epochs[-1]["wait_seconds"] += time.monotonic() - self._asked

        def batch_end(self, state: State, logger: Logger) -> None:
            epoch, loader = self.epochs[-1], state.train_dataloader
            assert state.previous_timestamp is not None
            epoch["images"] += int(state.timestamp.sample) - int(state.previous_timestamp.sample)
            epoch["steps"] += 1
            # Algorithms set the sizes of an epoch at its start, maybe after this callback saw it.
            epoch.update(image_size=getattr(loader, "image_size", None), batch_size=getattr(loader, "batch_size", None))

        def epoch_end(self, state: State, logger: Logger) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.epochs[-1]["peak_bytes"] = torch.cuda.max_memory_allocated()
            self.epochs[-1]["train_seconds"] = time.monotonic() - self._since

    return Meter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
