"""What every rank of test_two_ranks_train_as_one_process_does runs: `python whole_runs.py FOLDER STRATEGY`."""

from __future__ import annotations

import sys
from pathlib import Path

from training import session
from training.recipe import load_recipe

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
    "none": [],
    "ddp": [],
    "fsdp": [],
    "shards": ["parallelism.strategy=fsdp", "checkpoints.sharded=true"],
}


def train(folder: Path, name: str) -> None:
    """One epoch of each optimizer, named after the optimizer and `name`."""
    for kind, optimizer in OPTIMIZERS.items():
        file = folder / f"{kind}.yaml"
        if not file.exists():
            file.write_text(f"run_name: {kind}\n{SMALL}\n{optimizer}\n")
        settings = [f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}", f"run_name={kind}_{name}"]
        engine = [f"parallelism.strategy={name}"] if name != "shards" else []
        settings = [*settings, *engine, "parallelism.sync_batchnorm=true", *STRATEGIES[name]]
        session.train(load_recipe(file, settings), say=lambda text: None)


if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        train(Path(sys.argv[1]), strategy)
