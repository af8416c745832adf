"""Measures each phase of a run for a few steps, in Composer's Trainer as the run itself uses it.

A phase's Trainer starts at the phase's first epoch, as a resumed run does, trains short epochs of it again and again,
with evaluation and checkpoints (in a temporary folder), and ends when its share of the time is used. A second Trainer
takes its batches from memory, for the time of a step without the loader; and the loader is read without a Trainer.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from torch.profiler import ProfilerActivity, profile

from training.build import build_loaders
from training.callbacks import build_callbacks
from training.checkpoints.saving import Checkpoints
from training.engines.composer import build_trainer
from training.engines.ranks.start import start_distributed
from training.guards.finite import FiniteGuard
from training.planning import Plan, choose_place, make_plan
from training.probing.phases import Phase, chosen_phases, phases_of
from training.recipe import Recipe, RecipeError
from training.results.recorder import Recorder

MOST_PHASES = 6
_WARM_UP_STEPS = 4
_LEAST_EPOCHS = 2  # measured
_MOST_EVAL_BATCHES = 16
_LOADER_SHARE, _CACHED_SHARE, _EVAL_SHARE = 0.1, 0.2, 0.3  # of the time for a phase; evaluation's of what is left


@dataclass
class PhaseTimes:
    """What was measured in one phase, in seconds.

    windows: of one step each, a mean over some consecutive steps. between_epochs: what an epoch takes beside its steps,
    evaluation and checkpoint. wait_share: of the steps' time, spent waiting for the loader. cached: a step whose batch
    was in memory. loader: a step's batch from the loader alone. busy_share: of the time of such steps, with a GPU at
    work; None on CPUs. peak_bytes: of the device's memory, or the process's.
    """

    windows: list[float] = field(default_factory=list)
    between_epochs: list[float] = field(default_factory=list)
    wait_share: float = 0.0
    cached: float | None = None
    loader: float | None = None
    busy_share: float | None = None
    peak_bytes: int = 0


@dataclass
class Measured:
    """Everything measured: by index of the phase, and what all phases share, in seconds."""

    phases: dict[int, PhaseTimes]
    evaluations: list[float]
    checkpoints: list[float]
    start: float  # until the first Trainer stands


class Enough(Exception):
    """The measurement is complete."""


def measured_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as it is measured: silent, with an evaluation and a checkpoint after every epoch, into `folder`."""
    logging = recipe.logging
    return replace(
        recipe,
        results_dir=folder,
        load=None,
        autoresume=False,
        logging=type(logging)(progress_bar=False, level=logging.level, trackers={}),
        data=replace(recipe.data, eval=replace(recipe.data.eval, every_epochs=1)),
        checkpoints=replace(recipe.checkpoints, every_epochs=1, every_steps=None, keep_every_epochs=None, remote=None),
    )


def one_rank(recipe: Recipe, *, per_device_batch_size: int, world_size: int) -> Recipe:
    """The recipe for one process that does what one of `world_size` ranks does."""
    if world_size == 1:
        return recipe
    train = replace(recipe.data.train, global_batch_size=None, per_device_batch_size=per_device_batch_size)
    algorithms = dict(recipe.algorithms)
    resizing = algorithms.get("progressive_resizing") or {}
    if resizing.get("stages"):
        stages = [_stage_of_one(stage, world_size) for stage in resizing["stages"]]
        algorithms["progressive_resizing"] = {**resizing, "stages": stages}
    return replace(recipe, algorithms=algorithms, data=replace(recipe.data, train=train))


def measure(plan: Plan, *, seconds: float, say: Callable[[str], None], most_phases: int = MOST_PHASES) -> Measured:
    """Measure the phases of `plan`, each for its share of `seconds`. Raises RecipeError if it cannot run here."""
    place = replace(choose_place(plan.recipe), world_size=1)
    recipe = one_rank(plan.recipe, per_device_batch_size=plan.per_device_batch_size, world_size=plan.place.world_size)
    if recipe.parallelism.strategy == "deepspeed":
        raise RecipeError(
            "parallelism.strategy",
            "is deepspeed, whose steps --probe does not measure; python -m training.engines.compare does",
        )
    if any(epoch.drawn for epoch in plan.epochs):
        raise RecipeError(
            "algorithms.progressive_resizing.sizes",
            "has each step draw its size, which --probe does not measure; give stages of these sizes to measure each",
        )
    with tempfile.TemporaryDirectory() as folder:
        recipe = measured_recipe(recipe, Path(folder))
        recipe = replace(recipe, parallelism=replace(recipe.parallelism, strategy="none"))
        start_distributed(recipe, place)
        alone = make_plan(recipe, plan.facts, place)
        phases = phases_of(alone)
        chosen = chosen_phases(phases_of(plan), most=most_phases)
        loaders = build_loaders(alone, rank=0, say=say)
        found = Measured({}, [], [], 0.0)
        for index in chosen:
            phase = phases[index]
            say(f"measuring {phase.image_size} px, {phase.global_batch_size} images a step ...")
            found.phases[index] = _measure_phase(alone, phase, loaders, found, seconds=seconds / len(chosen))
    return found


def _measure_phase(plan: Plan, phase: Phase, loaders: Any, found: Measured, *, seconds: float) -> PhaseTimes:
    on_gpu = plan.place.device == "gpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    share = seconds * (1 - _LOADER_SHARE - _CACHED_SHARE)
    started = time.perf_counter()
    timer = _Timer(phase, seconds=share)
    _train(plan, phase, loaders, timer, whole=True)
    if not found.start:
        found.start = timer.fit_started - started
    found.evaluations += timer.evaluations
    found.checkpoints += timer.checkpoints
    times = PhaseTimes(windows=timer.windows, between_epochs=timer.between_epochs, wait_share=timer.wait_share)
    times.peak_bytes = (
        torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    cached = _Timer(phase, seconds=seconds * _CACHED_SHARE, warm_up_steps=2, least_epochs=1)
    busy = Busy(steps=phase.window_steps) if on_gpu else None
    _train(plan, phase, (CachedLoader(loaders[0]), loaders[1]), cached, whole=False, busy=busy)
    times.busy_share = None if busy is None else busy.share
    times.cached = statistics.mean(cached.windows)
    times.loader = _loader_seconds(loaders[0], phase, seconds=seconds * _LOADER_SHARE)
    return times


def _train(plan: Plan, phase: Phase, loaders: Any, timer: _Timer, *, whole: bool, busy: Busy | None = None) -> None:
    """Train `phase` until `timer` has enough. whole: with evaluation and checkpoints."""
    callbacks = build_callbacks(plan, Recorder(plan.recipe.run_dir if whole else None), loaders[0])
    # New weights in the middle of a schedule may well diverge, which says nothing of the run.
    unwanted = (FiniteGuard,) if whole else (FiniteGuard, Checkpoints)
    kept = [one for one in callbacks if not isinstance(one, unwanted)]
    saving = next((index for index, one in enumerate(kept) if isinstance(one, Checkpoints)), len(kept))
    kept = [*kept[:saving], _Mark(timer), *kept[saving:], timer, *([] if busy is None else [busy])]
    trainer = build_trainer(plan, loaders, callbacks=kept, load_path=None)
    evaluator = trainer.state.evaluators[0]
    evaluator.subset_num_batches = min(len(loaders[1]), _MOST_EVAL_BATCHES)
    if not whole:
        evaluator.eval_interval = lambda state, event: False
    timer.all_eval_batches = len(loaders[1])
    timer.start = Timestamp(epoch=phase.first_epoch, batch=sum(e.steps for e in plan.epochs[: phase.first_epoch]))
    trainer.state.timestamp = timer.start
    try:
        trainer.fit()
    except Enough:
        pass
    finally:
        trainer.end()


class _Mark(Callback):
    """Notes the moment before the checkpoint is written."""

    def __init__(self, timer: _Timer) -> None:
        self._timer = timer

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._timer.before_saving = self._timer.now()


class _Timer(Callback):
    """Times the steps of short epochs, all of them at one place of the run; raises Enough when its time is used.

    warm_up_steps: of the first epoch, not counted; None for one window. least_epochs: counted, whatever they take.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        seconds: float,
        warm_up_steps: int | None = None,
        least_epochs: int = _LEAST_EPOCHS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.windows: list[float] = []
        self.between_epochs: list[float] = []
        self.evaluations: list[float] = []
        self.checkpoints: list[float] = []
        self.start = Timestamp()
        self.fit_started = self.before_saving = 0.0
        self.all_eval_batches = 1
        self._phase, self._seconds, self._clock = phase, seconds, clock
        self._warm_up_steps = warm_up_steps or max(_WARM_UP_STEPS, phase.window_steps + 1)
        self._least_epochs = least_epochs
        self._epoch = self._planned = 0
        self._deadline = self._epoch_started = self._asked = self._waited = self._stepped = 0.0
        self._ends: list[float] = []  # of the epoch's steps
        self._eval_ends: list[float] = []
        self._evaluated = 0.0

    @property
    def wait_share(self) -> float:
        """Share of the steps' time that was spent waiting for the loader."""
        return self._waited / self._stepped if self._stepped else 0.0

    def now(self) -> float:
        """The clock, when the device has done what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock()

    def fit_start(self, state: State, logger: Logger) -> None:
        self.fit_started = self.now()
        self._deadline = self.fit_started + self._seconds

    def epoch_start(self, state: State, logger: Logger) -> None:
        state.dataloader_len = self._plan_steps()
        self._ends, self._evaluated = [], 0.0
        self._epoch_started = self.now()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = self._clock()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self._epoch and self._ends:
            self._waited += self._clock() - self._asked

    def batch_end(self, state: State, logger: Logger) -> None:
        whole_window = len(self._ends) % self._phase.window_steps == 0
        self._ends.append(self.now() if whole_window else self._clock())

    def eval_start(self, state: State, logger: Logger) -> None:
        self._eval_ends = [self.now()]

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self._eval_ends.append(self.now())

    def eval_end(self, state: State, logger: Logger) -> None:
        self._evaluated += self.now() - self._eval_ends[0]
        if self._epoch:
            self.evaluations.append(extrapolated(self._eval_ends, self.now(), count=self.all_eval_batches))

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        saved = self.now() - self.before_saving
        if self._epoch:
            self.checkpoints.append(saved)
            self._close(saved)
        elif self._least_epochs * self._evaluated > self._seconds * _EVAL_SHARE:
            for evaluator in state.evaluators:  # too slow to be measured again and again; the warm-up's must do
                evaluator.eval_interval = lambda state, event: False
            self.evaluations.append(extrapolated(self._eval_ends, self._eval_ends[-1], count=self.all_eval_batches))
        self._epoch += 1
        state.timestamp = self.start  # the same epoch again
        if self._epoch > self._least_epochs and self.now() >= self._deadline:
            raise Enough

    def _close(self, saved: float) -> None:
        ended, ends, size = self.now(), self._ends, self._phase.window_steps
        windows = [(ends[i + size] - ends[i]) / size for i in range(0, len(ends) - size, size)]
        if not windows:  # an epoch of one step
            windows = [(ends[-1] - self._epoch_started) / len(ends)]
        self.windows += windows
        steps = statistics.mean(windows) * len(ends)
        self._stepped += steps
        self.between_epochs.append(max(0.0, ended - self._epoch_started - steps - saved - self._evaluated))

    def _plan_steps(self) -> int:
        """Steps of the next epoch: few in the first, then as many whole windows, and a step, as fit beside others."""
        size, steps = self._phase.window_steps, self._phase.steps
        if not self._epoch:
            return min(steps, self._warm_up_steps)
        if self._epoch == 1:
            step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else 0.0
            fits = int(self._seconds / (self._least_epochs + 1) / max(step, 1e-6))
            self._planned = min(steps, max(1, fits // size) * size + 1)
        return self._planned


class Busy(Callback):
    """Profiles a few steps after the first, which no timer counts, for the share of their time that a GPU computes."""

    def __init__(self, *, steps: int) -> None:
        self.share: float | None = None
        self._steps, self._seen = steps, 0
        self._started = 0.0
        self._profile: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._seen == 1:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
            self._started = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._seen += 1
        if self._profile is not None and self._seen == 1 + self._steps:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self._started
            self._profile.__exit__(None, None, None)
            events = [
                (event.start_ns(), event.start_ns() + event.duration_ns())
                for event in self._profile.profiler.kineto_results.events()
                if event.device_type() == torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
            ]
            self._profile = None
            self.share = covered(events) / 1e9 / seconds


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, end)."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


class CachedLoader:
    """A loader that reads one batch of each size and gives it again and again."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._batch: tuple[tuple[int, int], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        shape = (self._loader.image_size, self._loader.batch_size)
        if self._batch is None or self._batch[0] != shape:
            passing = iter(self._loader)
            self._batch = (shape, next(passing))
            getattr(passing, "close", lambda: None)()
        for _ in range(len(self)):
            yield self._batch[1]


def extrapolated(ends: list[float], ended: float, *, count: int) -> float:
    """Seconds of `count` batches, of which some were measured: `ends` are the start and the end of each of those."""
    measured = len(ends) - 1
    if measured >= count or measured < 2:
        return (ended - ends[0]) * (count / measured if 0 < measured < count else 1)
    each = (ends[-1] - ends[1]) / (measured - 1)
    return ended - ends[0] + each * (count - measured)


def _loader_seconds(loader: Any, phase: Phase, *, seconds: float) -> float:
    """Seconds for a batch when nobody else works, without the first."""
    loader.set_image_size(phase.image_size)
    loader.set_batch_size(phase.global_batch_size)
    loader.set_position(phase.first_epoch, 0)
    passing = iter(loader)
    next(passing)
    started, batches = time.perf_counter(), 0
    for _ in passing:
        batches += 1
        if time.perf_counter() - started > seconds:
            break
    taken = time.perf_counter() - started
    getattr(passing, "close", lambda: None)()
    return taken / max(1, batches)


def _stage_of_one(stage: Any, world_size: int) -> Any:
    if stage.global_batch_size is None:
        return stage
    return replace(stage, global_batch_size=None, per_device_batch_size=stage.global_batch_size // world_size)
