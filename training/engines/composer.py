"""Training with Composer's Trainer: one process, DDP and FSDP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Callback, Evaluator
from composer.utils import reproducibility

from training.build import build_algorithms, build_data_specs, build_model, build_optimizer_of
from training.callbacks import build_callbacks, is_complete
from training.checkpoints.fitting import RefuseAnother
from training.checkpoints.reading import reading
from training.checkpoints.sharded import LoadShards, is_sharded
from training.engines.compiling import compile_ahead, compile_network, keep_kernels
from training.engines.ddp import composer_wraps_so
from training.engines.parallel import LikeDDP, fsdp_config
from training.engines.trainer import StepTrainer
from training.optimizers.schedule_free import ScheduleFree
from training.optimizers.switching import EvaluateAverages
from training.planning import Plan
from training.results.history import History
from training.results.recorder import Recorder


def train_composer(
    plan: Plan,
    loaders: tuple[Any, Any],
    *,
    load_path: str | None,
    say: Callable[[str], None],
) -> tuple[History, float]:
    """Returns the history and the training time in seconds. Every engine's function has this signature."""
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
        trainer.end()
    return {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics["eval"].items()}


def build_trainer(
    plan: Plan, loaders: tuple[Any, Any], *, callbacks: Sequence[Callback], load_path: str | None
) -> StepTrainer:
    """Composer's Trainer for the plan, with the checkpoint at `load_path` loaded."""
    recipe, model = plan.recipe, build_model(plan)
    if recipe.compile is not None:
        keep_kernels(Path(recipe.data.cache_dir) / "compiled")
    network = model.module
    train, evaluation = build_data_specs(plan, loaders)
    sharding = recipe.parallelism.strategy == "fsdp"
    callbacks = [*([LikeDDP()] if sharding else []), *callbacks]
    optimizer = build_optimizer_of(model, plan)
    if isinstance(optimizer, ScheduleFree):
        callbacks = [EvaluateAverages(train), *callbacks]
    trust = recipe.trust_checkpoint
    shards = LoadShards(load_path, trust=trust) if load_path is not None and is_sharded(load_path) else None
    if shards is not None:
        callbacks = [shards, *callbacks]
    elif load_path is not None:
        callbacks = [RefuseAnother(Path(load_path)), *callbacks]
    wrapping = composer_wraps_so(recipe.parallelism.ddp.gradient_compression)
    with wrapping, reading(load_path, trust=trust) if load_path is not None else nullcontext():
        trainer = StepTrainer(
            drop_last=recipe.data.train.drop_last,
            model=model,
            train_dataloader=train,
            eval_dataloader=Evaluator(label="eval", dataloader=evaluation),
            eval_interval=f"{recipe.data.eval.every_epochs}ep",
            max_duration=f"{recipe.epochs}ep",
            algorithms=list(build_algorithms(plan, loader=loaders[0]).values()),
            optimizers=optimizer,
            callbacks=callbacks,
            parallelism_config=fsdp_config(recipe.parallelism.fsdp, network) if sharding else None,
            run_name=recipe.run_name,
            progress_bar=False,
            load_path=load_path if shards is None else None,
            # The loaders can start at any batch of any epoch; spinning would decode and drop those already trained.
            spin_dataloaders=False,
            device=plan.place.device,
            precision=recipe.precision,
            device_train_microbatch_size=recipe.data.train.per_device_microbatch_size,
            seed=recipe.seed,
            auto_log_hparams=False,
        )
    if shards is not None:
        trainer._rng_state = shards.rng_state
    if recipe.compile is not None:
        # Not by Composer's compile_config, which compiles the wrapper of DDP, and evaluation calls what it wraps.
        compile_network(trainer._original_model.module, plan)  # pyright: ignore[reportArgumentType]
    return trainer


def _fit(trainer: StepTrainer, plan: Plan, say: Callable[[str], None]) -> float:
    """Train to the end; returns seconds."""
    started = time.monotonic()
    try:
        if is_complete(plan, trainer.state.timestamp, say):
            return 0.0
        restore_random_state(trainer)
        compile_ahead(trainer, plan, say)
        trainer.fit()
    finally:
        trainer.end()
    return time.monotonic() - started


def restore_random_state(trainer: Trainer) -> None:
    """Restore the random states in mid-epoch, where Composer does not. Call this before fitting a resumed `trainer`."""
    # Composer 0.32.1 restores them at an epoch's start, or while it spins through the batches that a resumed epoch has
    # already trained; our loaders skip those, so in mid-epoch the states would stay as the constructor left them.
    if trainer.state.timestamp.batch_in_epoch.value and trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)
        trainer._rng_state = None
