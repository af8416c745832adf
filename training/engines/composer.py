"""Training in Composer's Trainer: one process, DDP and FSDP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, Evaluator
from composer.utils import reproducibility

from training.build import build_algorithms, build_data_specs, build_model, build_optimizer_of
from training.callbacks import build_callbacks, is_complete
from training.checkpoints.sharded import LoadShards, is_sharded
from training.engines.parallel import LikeDDP, fsdp_config
from training.plan import Plan
from training.results.history import History
from training.results.recorder import Recorder


def train_composer(
    plan: Plan,
    loaders: tuple[Any, Any],
    *,
    load_path: str | None,
    say: Callable[[str], None],
) -> tuple[History, float]:
    """Returns what was recorded, and the seconds that training took. Every engine's function has this signature."""
    recorder = Recorder(plan.recipe.run_dir)
    callbacks = build_callbacks(plan, recorder, loaders[0])
    trainer = build_trainer(plan, loaders, callbacks=callbacks, load_path=load_path)
    seconds = _fit(trainer, plan, say)
    return recorder.history, seconds


def evaluate_composer(plan: Plan, loaders: tuple[Any, Any], *, checkpoint: str) -> dict[str, float]:
    """Top-1 and loss of `checkpoint` on the second loader. Every engine's function has this signature."""
    trainer = build_trainer(plan, loaders, callbacks=[], load_path=checkpoint)
    try:
        trainer.eval()
    finally:
        trainer.engine.close()
    return {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics["eval"].items()}


def build_trainer(
    plan: Plan, loaders: tuple[Any, Any], *, callbacks: Sequence[Callback], load_path: str | None
) -> Trainer:
    """Composer's Trainer with everything in place, and the checkpoint at `load_path` loaded."""
    recipe, model = plan.recipe, build_model(plan)
    network = model.module
    train, evaluation = build_data_specs(plan, loaders)
    sharding = recipe.parallelism.strategy == "fsdp"
    callbacks = [*([LikeDDP()] if sharding else []), *callbacks]
    shards = LoadShards(load_path) if load_path is not None and is_sharded(load_path) else None
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=Evaluator(label="eval", dataloader=evaluation),
        eval_interval=f"{recipe.data.eval.every_epochs}ep",
        max_duration=f"{recipe.epochs}ep",
        algorithms=list(build_algorithms(plan).values()),
        optimizers=build_optimizer_of(model, plan),
        callbacks=callbacks if shards is None else [shards, *callbacks],
        parallelism_config=fsdp_config(recipe.parallelism.fsdp, network) if sharding else None,
        run_name=recipe.run_name,
        progress_bar=False,
        load_path=load_path if shards is None else None,
        # The loaders know how to stand at any batch of any epoch; spinning would decode and drop what was trained on.
        spin_dataloaders=False,
        device=plan.place.device,
        precision=recipe.precision,
        compile_config=_compile_settings() if recipe.compile else None,
        device_train_microbatch_size=recipe.data.train.per_device_microbatch_size,
        seed=recipe.seed,
        auto_log_hparams=False,
    )
    if shards is not None:
        trainer._rng_state = shards.rng_state
    return trainer


def _compile_settings() -> dict[str, Any]:
    # Kernels for each shape that comes: sizes as variables make slower ones, and torch 2.7.0 fails on them at the
    # second image size. Stages, an epoch's last batch and evaluation make more shapes than the eight after which torch
    # would go on uncompiled.
    torch._dynamo.config.cache_size_limit = 64
    return {"dynamic": False}


def _fit(trainer: Trainer, plan: Plan, say: Callable[[str], None]) -> float:
    """Train to the end; returns seconds."""
    started = time.monotonic()
    try:
        if is_complete(plan, trainer.state.timestamp, say):
            return 0.0
        restore_random_state(trainer)
        trainer.fit()
    finally:
        trainer.engine.close()  # not trainer.close(): its barrier would keep a rank that failed from saying so
    return time.monotonic() - started


def restore_random_state(trainer: Trainer) -> None:
    """Before a fit of a `trainer` that has loaded a checkpoint: the random states, where Composer leaves them."""
    # Composer 0.32.1 restores it at an epoch's start, or while it spins through the batches that a resumed epoch has
    # behind it; our loaders skip those, so in mid-epoch it would stay where the constructor left it.
    if trainer.state.timestamp.batch_in_epoch.value and trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)
        trainer._rng_state = None
