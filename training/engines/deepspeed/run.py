"""Training on a DeepSpeed engine, which Composer's Trainer does not support.

DeepSpeed holds the weights, the gradients and the optimizer. Everything else is shared with the other engines: the same
callbacks and algorithm objects read and write Composer's State and receive its events in the Trainer's order. So random
draws, sizes, schedules and records are the same.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Engine, Event, State, Timestamp
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, get_device, reproducibility
from torch import Tensor
from torchmetrics import Metric

from algos import FixRes, apply_channels_last
from algos.fixres import Trained
from algos.framework.base import SpeedUp
from training.build import build_algorithms, build_data_specs, build_model, build_optimizer_of
from training.callbacks import build_callbacks, is_complete
from training.checkpoints.reading import reading
from training.checkpoints.zero import load_zero, save_zero
from training.engines.deepspeed.frozen import put_frozen_apart
from training.engines.deepspeed.passes import Passes
from training.engines.deepspeed.settings import deepspeed_config, zero_stage
from training.engines.parallel import LikeDDP
from training.planning import Plan
from training.recipe import Recipe
from training.results.history import History
from training.results.recorder import Recorder

_EVALUATOR = "eval"


def train_deepspeed(
    plan: Plan,
    loaders: tuple[Any, Any],
    *,
    load_path: str | None,
    say: Callable[[str], None],
) -> tuple[History, float]:
    """Train `plan`; returns the history and the training time in seconds."""
    recorder = Recorder(plan.recipe.run_dir)
    callbacks = build_callbacks(plan, recorder, loaders[0], save_folder=lambda *args: run.save(*args))
    run = DeepSpeedRun(plan, loaders, callbacks=callbacks)
    try:
        if load_path is not None:
            run.load(Path(load_path))
        seconds = run.fit(say)
    finally:
        run.close()
    return recorder.history, seconds


def evaluate_deepspeed(plan: Plan, loaders: tuple[Any, Any], *, checkpoint: str) -> dict[str, float]:
    """Top-1 and loss of `checkpoint` on the second loader."""
    run = DeepSpeedRun(plan, loaders, callbacks=[])
    try:
        run.load(Path(checkpoint))
        return run.evaluate()
    finally:
        run.close()


class DeepSpeedRun:
    """A network, its optimizer and its loaders on a DeepSpeed engine, with the training loop.

    state: Composer's, for the callbacks and the algorithms; its model is the network that DeepSpeed manages.
    engine: DeepSpeed's.
    """

    def __init__(self, plan: Plan, loaders: tuple[Any, Any], *, callbacks: list[Callback]) -> None:
        recipe = plan.recipe
        self._plan = plan
        self.state = _build_state(plan, loaders, callbacks=[LikeDDP(), *callbacks])
        self._logger = Logger(self.state)
        self._events = Engine(self.state, self._logger)
        self._train, self._evaluation = build_data_specs(plan, loaders)
        self._evaluates_at = create_interval_scheduler(
            f"{recipe.data.eval.every_epochs}ep", checkpoint_events=False, final_events={Event.FIT_END}
        )
        self._settings: dict[str, Any] = {"world_size": plan.place.world_size, "zero_stage": zero_stage(recipe)}
        self._events.run_event(Event.INIT)
        self._settings["fixres_trains"] = _freeze_apart(self.state) if zero_stage(recipe) else None
        if "channels_last" in recipe.algorithms:
            apply_channels_last(self.state.model, weights=False)  # ZeRO's flat partitions keep no strides
        self.engine = _initialize(
            self.state, deepspeed_config(recipe, per_device_batch_size=plan.per_device_batch_size), recipe
        )
        self._passes = Passes(self.state, self.engine)

    def fit(self, say: Callable[[str], None]) -> float:
        """Train to the end; returns seconds."""
        started = time.monotonic()
        if is_complete(self._plan, self.state.timestamp, say):
            return 0.0
        self._events.run_event(Event.FIT_START)
        self.engine.train()
        assert self.state.max_duration is not None
        while self.state.timestamp < self.state.max_duration:
            self._train_epoch()
        self._events.run_event(Event.FIT_END)
        self._evaluate_if_due(Event.FIT_END)
        return time.monotonic() - started

    def evaluate(self) -> dict[str, float]:
        """Top-1 and loss on the evaluation loader. Every rank must call this."""
        self._evaluate()
        return {name: float(metric.compute()) for name, metric in self.state.eval_metrics[_EVALUATOR].items()}

    def save(self, state: State, folder: Path) -> None:
        """Write the run's whole state to the new folder `folder`. Every rank must call this."""
        save_zero(self.engine, state, folder, settings=self._settings)

    def load(self, folder: Path) -> None:
        """Resume from the checkpoint in `folder`. Raises RecipeError if another engine wrote it."""
        self._events.run_event(Event.BEFORE_LOAD)
        with reading(folder, trust=self._plan.recipe.trust_checkpoint):
            load_zero(self.engine, self.state, self._logger, folder, settings=self._settings)
        self._events.run_event(Event.AFTER_LOAD)

    def close(self) -> None:
        """Release the engine; no training is possible afterwards."""
        self._events.close()
        self.engine.destroy()

    def _train_epoch(self) -> None:
        state = self.state
        if state.timestamp.batch_in_epoch.value == 0:
            self._events.run_event(Event.EPOCH_START)
        for batch in self._batches():
            state.batch = self._train.batch_transforms(batch)
            self._train_batch()
        state.previous_timestamp, state.timestamp = state.timestamp, state.timestamp.to_next_epoch()
        self._events.run_event(Event.EPOCH_END)
        self._evaluate_if_due(Event.EPOCH_END)
        self._events.run_event(Event.EPOCH_CHECKPOINT)

    def _batches(self) -> Iterator[Any]:
        assert self.state.dataloader is not None
        batches = iter(self.state.dataloader)
        while True:
            self._events.run_event(Event.BEFORE_DATALOADER)
            try:
                yield next(batches)
            except StopIteration:
                return

    def _train_batch(self) -> None:
        state, started = self.state, datetime.datetime.now()
        self._events.run_event(Event.AFTER_DATALOADER)
        self._events.run_event(Event.BATCH_START)
        loss, samples = self._forward_and_backward()
        self._events.run_event(Event.AFTER_TRAIN_BATCH)
        self.engine.step()
        state.total_loss_dict = {"loss/train/total": loss}
        for name, metric in (state.train_metrics or {}).items():
            state.train_metric_values[name] = metric.compute()
        state.previous_timestamp = state.timestamp
        state.timestamp = state.timestamp.to_next_batch(samples=samples, duration=datetime.datetime.now() - started)
        self._events.run_event(Event.BATCH_END)
        self._events.run_event(Event.BATCH_CHECKPOINT)

    def _forward_and_backward(self) -> tuple[float, int]:
        """Compute gradients of the mean loss over all ranks' images, accumulated over microbatches.

        Returns that loss and the number of images.
        """
        state, model = self.state, self.engine.module
        metrics = state.train_metrics or {}
        for metric in metrics.values():
            metric.reset()
        assert state.device_train_microbatch_size is not None
        samples = _sum_over_ranks(len(state.batch[1]), state.device)
        per_rank = samples / dist.get_world_size()  # gradients are averaged over ranks, so weight by the mean batch
        total = torch.zeros((), device=next(model.parameters()).device)
        microbatches = list(self._train.split_batch(state.batch, state.device_train_microbatch_size))
        self._events.run_event(Event.BEFORE_TRAIN_BATCH)
        one_pass = self._passes.for_this_step()
        for index, microbatch in enumerate(microbatches):
            state.batch = microbatch
            self._events.run_event(Event.BEFORE_FORWARD)
            outputs = one_pass.forward(microbatch)
            self._events.run_event(Event.BEFORE_LOSS)
            with get_precision_context(state.precision, state.precision_config):
                loss = model.loss(outputs, state.batch) * (len(microbatch[1]) / per_rank)
            self._events.run_event(Event.BEFORE_BACKWARD)
            one_pass.backward(loss)
            if index + 1 == len(microbatches):
                one_pass.finish()
            self._events.run_event(Event.AFTER_BACKWARD)
            total += loss.detach()
            _update(metrics, model, microbatch, outputs.detach())
        return _sum_over_ranks(total.item(), state.device) / dist.get_world_size(), int(samples)

    def _evaluate_if_due(self, event: Event) -> None:
        if self._evaluates_at(self.state, event):
            self._events.run_event(Event.EVAL_BEFORE_ALL)
            self._evaluate()
            self._events.run_event(Event.EVAL_AFTER_ALL)

    def _evaluate(self) -> None:
        state, train = self.state, (self.state.dataloader, self.state.dataloader_label, self.state.dataloader_len)
        metrics = state.eval_metrics[_EVALUATOR]
        state.set_dataloader(self._evaluation.dataloader, _EVALUATOR)
        state.eval_timestamp = Timestamp()
        self.engine.eval()
        self._events.run_event(Event.EVAL_START)
        for metric in metrics.values():
            metric.reset()
        with torch.no_grad():
            for batch in self._evaluation.dataloader:
                batch = self._evaluation.batch_transforms(batch)
                _update(metrics, self.engine.module, batch, self.engine(batch))
        self._events.run_event(Event.EVAL_END)
        self.engine.train()
        state.set_dataloader(*train)  # pyright: ignore[reportArgumentType]: the length is known


def _build_state(plan: Plan, loaders: tuple[Any, Any], *, callbacks: list[Callback]) -> State:
    recipe, device = plan.recipe, get_device(plan.place.device)
    model = device.module_to_device(build_model(plan))
    train, _ = loaders
    microbatch_size = recipe.data.train.per_device_microbatch_size or train.batch_size
    assert isinstance(microbatch_size, int), "auto is refused"
    state = State(
        model=model,
        rank_zero_seed=recipe.seed,
        run_name=recipe.run_name,
        device=device,
        max_duration=f"{recipe.epochs}ep",
        device_train_microbatch_size=microbatch_size,
        train_dataloader=train,
        dataloader=train,
        dataloader_label="train",
        precision=recipe.precision,
        optimizers=build_optimizer_of(model, plan),
        algorithms=list(_algorithms(plan).values()),
        callbacks=callbacks,
    )
    state.train_metrics = _on_device(model.get_metrics(is_train=True), state)
    state.eval_metrics = {_EVALUATOR: _on_device(model.get_metrics(is_train=False), state)}
    return state


def _algorithms(plan: Plan) -> dict[str, SpeedUp]:
    """All but two, which DeepSpeed's own clipping and `apply_channels_last` replace."""
    arranged = build_algorithms(plan)
    return {name: one for name, one in arranged.items() if name not in ("channels_last", "composer.gradient_clipping")}


def _freeze_apart(state: State) -> Trained | None:
    """Prepare the optimizer for FixRes, if it freezes parameters; returns what it trains in its phase."""
    fixres: Any = next((one for one in state.algorithms if isinstance(one, FixRes)), None)
    if fixres is None or fixres.train == "all":
        return None
    put_frozen_apart(state.optimizers[0], state.model, train=fixres.train)
    return fixres.train


def _initialize(state: State, config: dict[str, Any], recipe: Recipe) -> Any:
    os.environ.setdefault("LOCAL_RANK", str(dist.get_local_rank()))
    import deepspeed

    # Without the faster all-reduce for CPU ranks: DeepSpeed would compile it now, in minutes, with a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    deepspeed.utils.logger.setLevel(logging.getLevelName(recipe.logging.level.upper()))
    deepspeed.utils.logger.addFilter(_is_of_use)
    optimizer = state.optimizers[0]
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    engine, *_ = deepspeed.initialize(model=state.model, optimizer=optimizer, config=config)
    reproducibility.seed_all(state.seed)
    return engine


def _is_of_use(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # check_deepspeed refused those that ZeRO breaks


def _update(metrics: dict[str, Metric], model: Any, batch: Any, outputs: Tensor) -> None:
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)


def _on_device(metrics: dict[str, Metric], state: State) -> dict[str, Metric]:
    return {name: state.device.module_to_device(metric) for name, metric in metrics.items()}


def _sum_over_ranks(value: float, device: Any) -> float:
    tensor = device.tensor_to_device(
        torch.tensor(value, dtype=torch.float64 if device.name == "cpu" else torch.float32)
    )
    dist.all_reduce(tensor, reduce_operation="SUM")
    return tensor.item()
