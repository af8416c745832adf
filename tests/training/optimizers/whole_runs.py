"""What every rank of test_two_ranks_train_as_one_process_does runs: `python whole_runs.py FOLDER STRATEGY ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from resumed_runs import quiet, train_until

from training import session
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


def train(folder: Path, name: str) -> None:
    """One epoch of each optimizer, named after the optimizer and `name`."""
    for kind in OPTIMIZERS:
        session.train(recipe_of(folder, kind, name, f"{kind}_{name}"), say=quiet)


def train_and_resume(folder: Path, name: str) -> None:
    """The same, in runs that end right after a checkpoint in mid-epoch and go on from it with other random numbers."""
    for kind in OPTIMIZERS:
        settings = (folder, kind, name, f"{kind}_{name}_resumed", f"checkpoints.every_steps={STOP_AT_STEP}")
        train_until(STOP_AT_STEP, recipe_of(*settings), event="batch_checkpoint")
        torch.manual_seed(1234)
        session.train(recipe_of(*settings, "load=latest"), say=quiet)


def recipe_of(folder: Path, kind: str, name: str, run_name: str, *overrides: str) -> Recipe:
    """kind: of OPTIMIZERS; name: of STRATEGIES."""
    file = folder / f"{kind}.yaml"
    if not file.exists():
        file.write_text(f"run_name: {kind}\n{SMALL}\n{OPTIMIZERS[kind]}\n")
    places = [f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}", f"run_name={run_name}"]
    return load_recipe(file, [*places, "parallelism.sync_batchnorm=true", *STRATEGIES[name], *overrides])


if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        train(Path(sys.argv[1]), strategy)
        if strategy != "ddp":
            train_and_resume(Path(sys.argv[1]), strategy)
