"""Sends a run's values to TensorBoard, Weights & Biases and MLflow, through Composer's own loggers for these.

Composer's Trainer would send what it measures itself, under its own names, at every step; DeepSpeed's loop sends
nothing. So the loggers are not given to either: `Tracking` is a callback that holds them, and writes the same values
under the same names whatever the engine.

    train/loss                                            mean over the interval
    train/learning_rate, image_size                       of the last step
    time/images_per_second, data_wait_share               over the interval
    time/mfu or gmacs_per_second                          likewise
    memory/peak_gib (GPU, so far) or resident_gib (CPU)   of rank 0
    eval/top1, loss                                       after each evaluation
    epoch/train_loss, train_top1, images_per_second ...   after each epoch, as in metrics.csv
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from training.recipe import flat_keys
from training.results.history import EPOCH_COLUMNS
from training.results.meter import Meter, Work, memory_bytes
from training.results.recorder import Recorder

__all__ = ["Tracking", "check_wandb_login", "open_trackers"]

log = logging.getLogger(__name__)

_OFFLINE_MODES = ("offline", "dryrun", "disabled")
_EPOCH_VALUES = ("train_loss", "train_top1", "images_per_second", "train_seconds", "data_wait_share")


@dataclass
class Position:
    """What has been written so far, kept in the run's folder: a resumed run goes on from there.

    step, eval_step and epoch are the last ones written. The steps after the last checkpoint are trained again after an
    interruption, with the same result; they are not written again, so that no tracker goes back in steps.
    """

    path: Path
    step: int = 0
    eval_step: int = 0
    epoch: int = 0
    wandb_id: str | None = None
    mlflow_run_id: str | None = None

    @classmethod
    def read(cls, path: Path) -> Position:
        """The position in the file at `path`, or the start if there is none."""
        try:
            return cls(path, **json.loads(path.read_text()))
        except FileNotFoundError:
            return cls(path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it, and trackers start anew") from None

    def write(self) -> None:
        """Replace the file."""
        values = {name: value for name, value in vars(self).items() if name != "path"}
        beside = self.path.with_name(f"{self.path.name}.partial")  # not flushed to the disk, at every few steps
        beside.write_text(json.dumps(values))
        os.replace(beside, self.path)


class Tracking(Callback):
    """Writes a run's values to `trackers` every `interval_steps` steps, after each evaluation and after each epoch.

    Values are what the host knows, besides the mean loss, for which it waits once in `interval_steps` steps. Rank 0
    writes. A tracker that fails during the run is reported once and no longer used; training goes on.

    trackers: name -> a function that makes Composer's logger for it, given the position; None on a rank that has none.
    recorder: the run's; list it before this callback.
    settings: the recipe, which a new run notes down once.
    """

    def __init__(
        self,
        trackers: Mapping[str, Callable[[Position], LoggerDestination | None]],
        *,
        recorder: Recorder,
        run_dir: str | os.PathLike[str],
        interval_steps: int = 10,
        work: Work | None = None,
        device: str = "cpu",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._position = Position.read(Path(run_dir) / "trackers.json")
        self._makers, self._trackers = dict(trackers), {}
        self._recorder = recorder
        self._interval_steps = interval_steps
        self._work = work
        self._device = device
        self._settings = settings
        self._meter = Meter()
        self._learning_rate: float | None = None

    def init(self, state: State, logger: Logger) -> None:
        for name, make in self._makers.items():
            try:
                tracker = make(self._position)
                if tracker is not None:
                    self._trackers[name] = tracker
                    with _AROUND_INIT.get(name, nullcontext)(self._position):
                        tracker.init(state, logger)
            except Exception as error:  # whatever the service's own library raises, before the first step
                text = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"logging.trackers.{name}: {text}; set logging.trackers.{name}=null") from error
        if dist.get_global_rank() == 0:
            self._note_settings()
            self._keep_ids()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._meter.fit_start(state)

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
        step = int(state.timestamp.batch)
        if step % self._interval_steps == 0:
            values = self._step_values(state)
            if step > self._position.step:
                self._position.step = step
                self._write(values, step=step)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._meter.epoch_end()

    def eval_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if state.dataloader_label != "eval" or step <= self._position.eval_step:
            return
        metrics = state.eval_metrics.get("eval", {})
        self._position.eval_step = step
        self._write({f"eval/{name}": float(metric.compute()) for name, metric in metrics.items()}, step=step)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        epochs = self._recorder.history.epochs
        if not epochs or epochs[-1]["epoch"] <= self._position.epoch:
            return
        self._position.epoch = epochs[-1]["epoch"]
        row = {f"epoch/{name}": epochs[-1][name] for name in EPOCH_COLUMNS if name in _EPOCH_VALUES}
        self._write(row, step=int(state.timestamp.batch))

    def close(self, state: State, logger: Logger) -> None:
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close(state, logger))

    def post_close(self) -> None:
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.post_close())
        self._trackers = {}

    def _step_values(self, state: State) -> dict[str, float | None]:
        loss, reading = self._meter.mean_loss(), self._meter.take()
        gib = memory_bytes(self._device) / 2**30
        speed = (
            self._work.speed(reading.images_per_second, epoch=int(state.timestamp.epoch))
            if self._work is not None
            else {}
        )
        return {
            "train/loss": loss,
            "train/learning_rate": self._learning_rate,
            "train/image_size": getattr(state.train_dataloader, "image_size", None),
            "time/images_per_second": reading.images_per_second,
            "time/data_wait_share": reading.data_wait_share,
            **{f"time/{name}": value for name, value in speed.items()},
            "memory/peak_gib" if self._device == "gpu" else "memory/resident_gib": gib,
        }

    def _write(self, values: Mapping[str, float | None], *, step: int) -> None:
        if dist.get_global_rank() != 0:
            return
        known = {name: float(value) for name, value in values.items() if value is not None}
        for name in list(self._trackers):
            self._try(name, lambda tracker: _write_to(tracker, known, step))
        self._position.write()

    def _try(self, name: str, act: Callable[[Any], None]) -> None:
        try:
            act(self._trackers[name])
        except Exception as error:  # a server that went away, a full disk: no reason to lose the run
            text = " ".join(str(error).split()) or type(error).__name__
            log.warning("logging.trackers.%s failed and is no longer written: %s", name, text)
            self._trackers.pop(name, None)

    def _note_settings(self) -> None:
        flat = flat_keys(dict(self._settings or {}))
        is_new = {"wandb": self._position.wandb_id is None, "mlflow": self._position.mlflow_run_id is None}
        for name in list(self._trackers):
            if flat and is_new.get(name):
                self._try(name, lambda tracker: tracker.log_hyperparameters(flat))

    def _keep_ids(self) -> None:
        if "wandb" in self._trackers:
            self._position.wandb_id = _wandb_id()
        if "mlflow" in self._trackers:
            self._position.mlflow_run_id = self._trackers["mlflow"]._run_id
        self._position.write()


def open_trackers(
    trackers: Mapping[str, Mapping[str, Any] | None], *, run_dir: Path
) -> dict[str, Callable[[Position], LoggerDestination | None]]:
    """Makers of the loggers that the recipe's section logging.trackers asks for; nothing is opened yet."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return {
        name: lambda position, make=makers[name], given=settings: make(given, position, run_dir)
        for name, settings in trackers.items()
        if settings is not None
    }


def check_wandb_login(settings: Mapping[str, Any] | None) -> None:
    """Raise ValueError if Weights & Biases is to be used online and nobody is logged in."""
    if settings is None or settings["mode"] == "offline" or os.environ.get("WANDB_MODE") in _OFFLINE_MODES:
        return
    if os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        logged_in = wandb.login(prompt=False)
    else:  # before it had that argument, it would have asked
        logged_in = bool(wandb.api.api_key)
    if not logged_in:
        raise ValueError(
            "nobody is logged in to Weights & Biases on this machine: run wandb login, set WANDB_API_KEY, "
            "or set logging.trackers.wandb.mode=offline"
        )


def _tensorboard(settings: Mapping[str, Any], position: Position, run_dir: Path) -> LoggerDestination | None:
    from composer.loggers import TensorboardLogger

    if dist.get_global_rank() != 0:
        return None  # it would leave an empty file
    return TensorboardLogger(log_dir=settings["folder"] or str(run_dir.parent))  # which adds the run's name


def _wandb(settings: Mapping[str, Any], position: Position, run_dir: Path) -> LoggerDestination:
    from composer.loggers import WandBLogger

    given = {name: value for name, value in settings.items() if name != "mode" and value is not None}
    options: dict[str, Any] = {"dir": str(run_dir), "resume": "allow"}
    if settings["mode"] == "offline":
        options["mode"] = "offline"
    if position.wandb_id is not None:
        options["id"] = position.wandb_id
    return WandBLogger(**given, init_kwargs=options)


def _mlflow(settings: Mapping[str, Any], position: Position, run_dir: Path) -> LoggerDestination:
    import mlflow  # noqa: F401  (its import sets the level of its log)
    from composer.loggers import MLFlowLogger

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells of each table that it makes
    uri = settings["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
    with _loggers_left_on():
        return MLFlowLogger(
            experiment_name=settings["experiment_name"],
            run_name=settings["run_name"],
            tracking_uri=uri or f"sqlite:///{run_dir.parent.resolve() / 'mlflow.db'}",
            synchronous=settings["synchronous"],
            log_system_metrics=False,
            log_duplicated_metric_every_n_steps=1,  # else a value that stays the same for a hundred steps is left out
        )


def _write_to(tracker: Any, values: dict[str, float], step: int) -> None:
    tracker.log_metrics(values, step=step)
    writer = getattr(tracker, "writer", None)
    if writer is not None:
        writer.flush()  # Composer's own flush closes the file and begins another


def _wandb_id() -> str | None:
    import wandb

    return wandb.run.id if wandb.run is not None else None


@contextmanager
def _loggers_left_on() -> Iterator[None]:
    """Undoes what MLflow does to other loggers when it makes its database: it turns off those that exist."""
    root = logging.getLogger()
    loggers = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger) and not one.disabled]
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        for one in loggers:
            one.disabled = False
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def _continue_mlflow_run(position: Position) -> Iterator[None]:
    """Inside the context, Composer's logger continues the position's run: it takes the run's id from this variable."""
    name = "MLFLOW_RUN_ID"
    if position.mlflow_run_id is None or name in os.environ:
        with _loggers_left_on():
            yield
        return
    os.environ[name] = position.mlflow_run_id
    try:
        with _loggers_left_on():
            yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def _restore_wandb_get_url(position: Position) -> Iterator[None]:
    """Inside the context, a W&B run has `get_url`: Composer 0.32.1 calls it, and W&B 0.31 has `url` only."""
    from wandb.sdk.wandb_run import Run

    if hasattr(Run, "get_url"):
        yield
        return
    Run.get_url = lambda run: run.url  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del Run.get_url  # pyright: ignore[reportAttributeAccessIssue]


_AROUND_INIT = {"mlflow": _continue_mlflow_run, "wandb": _restore_wandb_get_url}
