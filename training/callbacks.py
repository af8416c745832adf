"""The callbacks of every run, under any engine: loader position, recorder, checkpoints, progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import Callback, State, Timestamp
from composer.loggers import Logger

from training.checkpoints.remote.store import Store
from training.checkpoints.remote.uploads import Uploads
from training.checkpoints.saving import Checkpoints
from training.guards.finite import FiniteGuard
from training.planning import Plan
from training.recipe import Recipe
from training.results.meter import Work, device_peak_flops
from training.results.progress import ProgressBar
from training.results.recorder import Recorder


def build_callbacks(
    plan: Plan,
    recorder: Recorder,
    loader: Any,
    *,
    save_folder: Callable[[State, Path], None] | None = None,
) -> list[Callback]:
    """The callbacks of a run. save_folder: writes checkpoints for an engine whose state Composer's State lacks."""
    recipe = plan.recipe
    guard = FiniteGuard(recipe.on_nan, run_dir=recipe.run_dir, image_indices=loader.image_indices)
    # The recorder closes an epoch's row before the checkpoint that holds it is written.
    return [
        _LoaderPosition(loader),
        recorder,
        guard,
        Checkpoints(
            recipe.run_dir / "checkpoints",
            every_epochs=recipe.checkpoints.every_epochs,
            every_steps=recipe.checkpoints.every_steps,
            every_minutes=recipe.checkpoints.every_minutes,
            keep_every_epochs=recipe.checkpoints.keep_every_epochs,
            keep_best=recipe.checkpoints.keep_best,
            keep=recipe.checkpoints.keep,
            asynchronous=recipe.checkpoints.asynchronous,
            stop_seconds=recipe.checkpoints.stop_seconds,
            sharded=recipe.checkpoints.sharded or save_folder is not None,
            save_folder=save_folder,
            before_save=guard.settle,
            uploads=_uploads(recipe),
        ),
        ProgressBar(
            epoch_costs=[epoch.total_macs for epoch in plan.epochs],
            total_epochs=recipe.epochs,
            work=work_of(plan),
            device=plan.place.device,
            enabled=recipe.logging.progress_bar,
        ),
        *_watching(plan, recorder),
    ]


def _uploads(recipe: Recipe) -> Uploads | None:
    url = recipe.checkpoints.remote
    if url is None:
        return None
    return Uploads(Store(url, recipe.run_name), recipe.run_dir / "checkpoints", keep=recipe.checkpoints.keep)


def _watching(plan: Plan, recorder: Recorder) -> list[Callback]:
    """The callbacks of the section logging that are off unless asked for, and imported then."""
    recipe, callbacks = plan.recipe, []
    trackers = {name: settings for name, settings in recipe.logging.trackers.items() if settings is not None}
    if trackers:
        from training.results.tracking import Tracking, open_trackers

        callbacks.append(
            Tracking(
                open_trackers(trackers, run_dir=recipe.run_dir),
                recorder=recorder,
                run_dir=recipe.run_dir,
                interval_steps=recipe.logging.tracker_interval_steps,
                work=work_of(plan),
                device=plan.place.device,
                settings=recipe.settings,
            )
        )
    if recipe.logging.profile is not None:
        from training.results.profile import Profile

        first, last = recipe.logging.profile["steps"]
        all_ranks = recipe.logging.profile["all_ranks"]
        callbacks.append(Profile(recipe.run_dir / "profile", first=first, last=last, all_ranks=all_ranks))
    return callbacks


def work_of(plan: Plan) -> Work:
    """What an image of each epoch costs, and the peak of the run's devices."""
    peak = device_peak_flops(plan.place.device, plan.recipe.precision)
    return Work(
        macs_per_image=[epoch.total_macs / max(1, epoch.trained_images) for epoch in plan.epochs],
        peak_flops=peak * plan.place.world_size if peak is not None else None,
    )


def is_complete(plan: Plan, done: Timestamp, say: Callable[[str], None]) -> bool:
    """Whether the run is complete at `done`; reports that, or where it resumes."""
    if done.epoch.value >= plan.recipe.epochs:
        say(f"{plan.recipe.run_name} is complete already: {plan.recipe.epochs} epochs")
        return True
    if done.batch.value:
        say(f"continuing after epoch {done.epoch.value}, step {done.batch.value}")
    return False


class _LoaderPosition(Callback):
    """Sets the training loader to the run's position, so that a resumed run trains on the batches not yet seen."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def fit_start(self, state: State, logger: Logger) -> None:
        self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._loader.set_position(state.timestamp.epoch.value, state.timestamp.batch_in_epoch.value)
