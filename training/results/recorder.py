"""Records a run: every step's loss and learning rate, every epoch's metrics and throughput.

`Ledger` does the bookkeeping and is independent of the Trainer; `Recorder` feeds it from the Trainer's events. The
history is part of the checkpoint, so a resumed run continues it from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from training.late import LateQueue, late
from training.results.history import STEP_COLUMNS, History, write_epochs_csv
from training.results.meter import Meter, Stopwatch

__all__ = ["History", "Ledger", "Recorder", "Stopwatch"]


class Recorder(Callback):
    """Records a run into `history` and keeps metrics.csv up to date after each epoch.

    List it before the callback that saves checkpoints: it closes an epoch's row at EPOCH_CHECKPOINT, after the
    evaluation, and the row belongs in that checkpoint. Training top-1 is read from the train metric `metric`,
    evaluation from the metrics `metric` and "loss" of the evaluator `evaluator`. A metric that the model lacks is
    recorded as None, and so is the evaluation of an epoch that ended without one.

    Training seconds are those of rank 0, from requesting a batch from the loader to the end of the step. They exclude
    evaluation, saving, and the batches that a resumed run skips. data_wait_share is the share of them that passed
    before the batch was there.

    Loss and top-1 are read from a GPU two steps late, and those of all steps before an evaluation, before the end of an
    epoch, and whenever the history or the state is asked for.

    folder: where metrics.csv goes (written by rank 0); None writes no file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        metric: str = "top1",
        evaluator: str = "eval",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._csv_path = None if folder is None else Path(folder) / "metrics.csv"
        self._metric = metric
        self._evaluator = evaluator
        self._ledger = Ledger()
        self._meter = Meter(clock)
        self._learning_rate: float | None = None
        self._unread: LateQueue[dict[str, Any]] = LateQueue()  # steps, as `Ledger.add_step` takes them

    @property
    def history(self) -> History:
        """A copy of what has been recorded so far."""
        self._read(self._unread.take_all())
        return self._ledger.history

    def fit_start(self, state: State, logger: Logger) -> None:
        self._meter.fit_start(state)
        self._write_csv()  # drops the rows that a killed run wrote after its last checkpoint

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._meter.epoch_start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._meter.before_dataloader()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._meter.after_dataloader()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        # The last event before the optimizer's step. At BATCH_END the schedulers have moved on to the next step's rate.
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        self._meter.batch_end(state)
        reading = self._meter.take()
        self._ledger.add_seconds(reading.seconds, waiting=reading.wait_seconds)
        step = {
            "step": int(state.timestamp.batch),
            "epoch": int(state.timestamp.epoch) + 1,
            "loss": late(state.total_loss_dict.get("loss/train/total")),
            "learning_rate": self._learning_rate,
            "images": reading.images,
            # Composer has just computed it over all ranks' batches, and resets the metric at every batch.
            "top1": late(state.train_metric_values.get(self._metric)),
            "image_size": getattr(state.train_dataloader, "image_size", None),
        }
        self._unread.put(step, step["loss"], step["top1"])
        self._read(self._unread.take_due())

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._read(self._unread.take_all())  # the epoch's time includes what the device has still to do
        self._meter.epoch_end()
        reading = self._meter.take()
        self._ledger.add_seconds(reading.seconds, waiting=reading.wait_seconds)

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.dataloader_label != self._evaluator:
            return
        self._read(self._unread.take_all())
        metrics = state.eval_metrics.get(self._evaluator, {})
        values = {
            name: _to_float(metrics[name].compute()) if name in metrics else None for name in (self._metric, "loss")
        }
        if self._ledger.add_evaluation(top1=values[self._metric], loss=values["loss"]):
            self._write_csv()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._read(self._unread.take_all())
        self._ledger.close_epoch(epoch=int(state.timestamp.epoch))
        self._write_csv()

    def state_dict(self) -> dict[str, Any]:
        self._read(self._unread.take_all())
        return self._ledger.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unread.clear()
        self._ledger.load_state_dict(state)

    def _read(self, steps: Iterable[dict[str, Any]]) -> None:
        for step in steps:
            self._ledger.add_step(**{**step, "loss": _to_float(step["loss"]), "top1": _to_float(step["top1"])})

    def _write_csv(self) -> None:
        if self._csv_path is not None and dist.get_global_rank() == 0:
            write_epochs_csv(self.history, self._csv_path)


class Ledger:
    """Collects steps into epochs. Holds plain numbers only, so its state goes into any checkpoint."""

    def __init__(self) -> None:
        self._epochs: list[dict[str, Any]] = []
        self._steps: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
        self._partial = _empty_epoch()
        self._evaluation: dict[str, float | None] | None = None  # of the weights after the last step

    @property
    def history(self) -> History:
        """A copy of what has been collected so far; an unfinished epoch is in the steps only."""
        return History(epochs=[dict(row) for row in self._epochs], steps={k: list(v) for k, v in self._steps.items()})

    def add_step(
        self,
        *,
        step: int,
        epoch: int,
        loss: float | None,
        learning_rate: float | None,
        images: int,
        top1: float | None = None,
        image_size: int | None = None,
    ) -> None:
        """Add a training step. `step` and `epoch` count from 1; loss, top1 and images are those of all ranks."""
        for name, value in zip(STEP_COLUMNS, (step, epoch, loss, learning_rate), strict=True):
            self._steps[name].append(value)
        partial = self._partial
        partial["images"] += images
        partial["largest_batch"] = max(partial["largest_batch"], images)
        if image_size is not None:  # the largest, as of batches
            partial["image_size"] = max(int(image_size), partial["image_size"] or 0)
        for name, value in (("loss", loss), ("top1", top1)):
            if value is not None:
                partial[f"{name}_sum"] += value * images
                partial[f"{name}_images"] += images
        self._evaluation = None

    def add_seconds(self, seconds: float, *, waiting: float = 0.0) -> None:
        """Add training time to the current epoch. waiting: the part of it that was spent waiting for a batch."""
        self._partial["seconds"] += seconds
        if self._partial["wait_seconds"] is not None:
            self._partial["wait_seconds"] += waiting

    def add_evaluation(self, *, top1: float | None, loss: float | None) -> bool:
        """Add an evaluation of the weights after the last step. True if it completed a row that was already closed,
        as the evaluation at the very end of a run does."""
        evaluation = {"eval_loss": loss, "eval_top1": top1}
        if self._partial["images"] or not self._epochs:
            self._evaluation = evaluation
            return False
        row = self._epochs[-1]
        if row["eval_loss"] is not None or row["eval_top1"] is not None:
            return False
        row.update(evaluation)
        return True

    def close_epoch(self, *, epoch: int) -> None:
        """Turn the steps since the last call into the row of `epoch` (the number of finished epochs)."""
        partial, rates = self._partial, self._steps["learning_rate"]
        evaluation = self._evaluation or {"eval_loss": None, "eval_top1": None}
        seconds, waiting = partial["seconds"], partial["wait_seconds"]
        self._epochs.append(
            {
                "epoch": epoch,
                "train_loss": _mean(partial, "loss"),
                "train_top1": _mean(partial, "top1"),
                "eval_loss": evaluation["eval_loss"],
                "eval_top1": evaluation["eval_top1"],
                "learning_rate": rates[-1] if rates else None,
                "image_size": partial["image_size"],
                "global_batch_size": partial["largest_batch"] or None,
                "images_per_second": partial["images"] / seconds if seconds > 0 else None,
                "train_seconds": seconds,
                "data_wait_share": min(1.0, waiting / seconds) if waiting is not None and seconds > 0 else None,
            }
        )
        self._partial = _empty_epoch()
        self._evaluation = None

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, including the sums of an unfinished epoch."""
        history = self.history
        evaluation = None if self._evaluation is None else dict(self._evaluation)
        return {
            "epochs": history.epochs,
            "steps": history.steps,
            "partial": dict(self._partial),
            "evaluation": evaluation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; what was collected here before is dropped."""
        state = deepcopy(state)
        self._epochs, self._steps = state["epochs"], state["steps"]
        # Checkpoints written before the waiting was measured have none; nothing is known of such an epoch's first part.
        unmeasured = {"wait_seconds": None if state["partial"]["images"] else 0.0}
        self._partial, self._evaluation = {**unmeasured, **state["partial"]}, state["evaluation"]


def _empty_epoch() -> dict[str, Any]:
    return {
        "images": 0,
        "largest_batch": 0,
        "image_size": None,
        "loss_sum": 0.0,
        "loss_images": 0,
        "top1_sum": 0.0,
        "top1_images": 0,
        "seconds": 0.0,
        "wait_seconds": 0.0,
    }


def _mean(partial: dict[str, Any], name: str) -> float | None:
    """Mean over the epoch's images; None unless every one of them was measured."""
    measured = partial[f"{name}_images"]
    return partial[f"{name}_sum"] / measured if measured and measured == partial["images"] else None


def _to_float(value: Any) -> float | None:
    return None if value is None else float(value)
