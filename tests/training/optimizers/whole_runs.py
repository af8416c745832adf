"""What every rank of test_two_ranks_train_as_one_process_does runs: `python whole_runs.py FOLDER STRATEGY ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback

from training import session
from training.engines import composer
from training.recipe import Recipe, load_recipe

SMALL = """
model: {name: resnet_digits, width: 4}
data:
  source: {name: digits}
  train: {image_size: 8, global_batch_size: 64, num_workers: 1}
  eval: {image_size: 8, per_device_batch_size: 180, num_workers: 1}
duration: {epochs: 1}
logging: {progress_bar: false}
"""
OPTIMIZERS = {
    "muon": "optimizer: {name: muon, learning_rate: 0.02, others: {name: sgd, learning_rate: 0.1}}",
    "free": "optimizer: {name: schedule_free_sgd, learning_rate: 0.5}\nschedule: {decay: constant, warmup_epochs: 0.5}",
}
STRATEGIES = {
    "none": ["parallelism.strategy=none"],
    "ddp": ["parallelism.strategy=ddp"],
    "fsdp": ["parallelism.strategy=fsdp"],
    "shards": ["parallelism.strategy=fsdp", "checkpoints.sharded=true"],
}


STOP_AT_STEP = 16


class _Stop(Exception):
    pass


class _StopAfterCheckpoint(Callback):
    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == STOP_AT_STEP:
            raise _Stop


def train(folder: Path, name: str) -> None:
    """One epoch of each optimizer, named after the optimizer and `name`."""
    for kind in OPTIMIZERS:
        session.train(recipe_of(folder, kind, name, f"{kind}_{name}"), say=_quiet)


def train_and_resume(folder: Path, name: str) -> None:
    """The same, in runs that end right after a checkpoint in mid-epoch and go on from it with other random numbers."""
    for kind in OPTIMIZERS:
        settings = (folder, kind, name, f"{kind}_{name}_resumed", f"checkpoints.every_steps={STOP_AT_STEP}")
        _train_until_stopped(recipe_of(*settings))
        torch.manual_seed(1234)
        session.train(recipe_of(*settings, "load=latest"), say=_quiet)


def recipe_of(folder: Path, kind: str, name: str, run_name: str, *overrides: str) -> Recipe:
    """kind: of OPTIMIZERS; name: of STRATEGIES."""
    file = folder / f"{kind}.yaml"
    if not file.exists():
        file.write_text(f"run_name: {kind}\n{SMALL}\n{OPTIMIZERS[kind]}\n")
    places = [f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}", f"run_name={run_name}"]
    return load_recipe(file, [*places, "parallelism.sync_batchnorm=true", *STRATEGIES[name], *overrides])


def _train_until_stopped(recipe: Recipe) -> None:
    build = composer.build_callbacks
    composer.build_callbacks = lambda *given, **named: [*build(*given, **named), _StopAfterCheckpoint()]
    try:
        session.train(recipe, say=_quiet)
        raise AssertionError("was not stopped")
    except _Stop:
        pass
    finally:
        composer.build_callbacks = build


def _quiet(text: str) -> None:
    pass


if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        train(Path(sys.argv[1]), strategy)
        if strategy != "ddp":
            train_and_resume(Path(sys.argv[1]), strategy)
