"""`run.py -f RECIPE --find-lr`: a learning-rate range test of a recipe as it is (Smith 2017, arXiv 1506.01186).

The recipe trains with its own algorithms, batch size and precision, at its first epoch's image size, while the
learning rate rises exponentially from step to step until the loss explodes. Each seed's loss over log10 of the rate
is smoothed by local linear regression with three bandwidths, which unlike a moving average does not lag, and each
curve gives two readings before the explosion: a tenth of the rate at which the loss is lowest, and the rate at which
it falls most steeply. The suggestion is the geometric mean of the medians of the two; the spread of all readings says
how sure it is.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State, Timestamp
from composer.loggers import Logger

from data.whole_files import replace_file
from training.build import build_loaders
from training.callbacks import build_callbacks
from training.checkpoints.saving import Checkpoints
from training.engines.composer import build_trainer
from training.engines.ranks.start import start_distributed
from training.facts import data_facts
from training.guards.finite import FiniteGuard
from training.planning import Plan, choose_place, make_plan
from training.probing.measure import Enough, measured_recipe
from training.recipe import Recipe, RecipeError
from training.results.recorder import Recorder

SECONDS = 42.0  # for both seeds; with imports and the plot: a minute
LOWEST, HIGHEST = 1e-3, 1e2  # times the recipe's own peak rate
BANDWIDTHS = (0.2, 0.3, 0.45)  # of the smoothing, in decades of the learning rate
_TIMED_STEPS = 6
_FEWEST_STEPS, _MOST_STEPS = 40, 200
_EXPLODED = 4.0  # times the lowest average so far, at which the test ends
_LOST_SHARE = 0.05  # of the first loss: a curve that rises by more is past its range, and may well fall again at last
_SURE, _UNSURE = 3.0, 10.0  # largest reading over the smallest


@dataclass(frozen=True)
class Suggestion:
    """learning_rate: suggested. low, high: the smallest and the largest of the readings."""

    learning_rate: float
    low: float
    high: float

    @property
    def confidence(self) -> str:
        """In words."""
        ratio = self.high / self.low
        if ratio <= _SURE:
            return "sure"
        return "fairly sure" if ratio <= _UNSURE else "not sure"


def find_learning_rate(recipe: Recipe, *, say: Callable[[str], None] = print, seconds: float = SECONDS) -> str:
    """Run the range test, write its plot and figures beside the run's folder, and return the suggestion as text.

    Raises RecipeError if the recipe cannot run here, and ValueError if the loss never falls.
    """
    if recipe.parallelism.strategy == "deepspeed":
        raise RecipeError("parallelism.strategy", "is deepspeed, which --find-lr does not drive; use ddp for this test")
    place = choose_place(recipe, world_size=1)
    curves: dict[int, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        quiet = measured_recipe(recipe, Path(folder))
        quiet = replace(quiet, parallelism=replace(recipe.parallelism, strategy="none"))
        start_distributed(quiet, place)
        plan = make_plan(quiet, data_facts(quiet), place)
        for seed in (recipe.seed, recipe.seed + 1):
            say(f"range test with seed {seed} ...")
            seeded = replace(plan, recipe=replace(quiet, seed=seed))
            curves[seed] = _range_test(seeded, seconds=seconds / 2, say=say)
    found = suggestion(list(curves.values()))
    prefix = recipe.results_dir / f"{recipe.run_name}_lr_range"
    _write(recipe, plan, curves, found, prefix)
    return _text(recipe, plan, found, prefix)


def suggestion(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Suggestion:
    """From (learning rates, losses) of each seed. Raises ValueError if no curve falls."""
    tenths, steepest = [], []
    for rates, losses in curves:
        for bandwidth in BANDWIDTHS:
            reading = _readings(rates, losses, bandwidth=bandwidth)
            if reading is not None:
                tenths.append(reading[0])
                steepest.append(reading[1])
    if not tenths:
        raise ValueError(
            "the loss never fell in the range test, so no learning rate can be suggested; raise "
            "optimizer.learning_rate, around which the range lies, or check the data"
        )
    middle = math.sqrt(statistics.median(tenths) * statistics.median(steepest))
    return Suggestion(middle, min(*tenths, *steepest), max(*tenths, *steepest))


def smoothed(rates: Sequence[float], losses: Sequence[float], *, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Local linear regression of the loss over log10 of the rate, with Gaussian weights: (values, slopes a decade).

    bandwidth: the standard deviation of the weights, in decades. A loss counts as at most 1.5 times the first ones'
    median, so that an explosion does not reach into what was before it. Fan and Gijbels, Local Polynomial Modelling
    (1996).
    """
    x, y = np.log10(np.asarray(rates)), np.asarray(losses)
    y = np.minimum(y, 1.5 * np.median(y[: max(3, len(y) // 5)]))
    distance = x[:, None] - x
    weight = np.exp(-0.5 * (distance / bandwidth) ** 2)
    s0, s1, s2 = (np.sum(weight * distance**power, axis=0) for power in range(3))
    t0, t1 = (np.sum(weight * distance**power * y[:, None], axis=0) for power in range(2))
    determinant = s0 * s2 - s1 * s1
    return (s2 * t0 - s1 * t1) / determinant, (s0 * t1 - s1 * t0) / determinant


def _readings(rates: Sequence[float], losses: Sequence[float], *, bandwidth: float) -> tuple[float, float] | None:
    if len(losses) < 3:
        return None
    values, slopes = smoothed(rates, losses, bandwidth=bandwidth)
    fallen = values[0] - np.minimum.accumulate(values)
    lost = np.flatnonzero(values > values[0] + np.maximum(fallen, _LOST_SHARE * abs(values[0])))
    lowest = int(np.argmin(values[: lost[0]] if len(lost) else values))
    first = int(np.searchsorted(np.log10(rates), np.log10(rates[0]) + bandwidth))  # at the edge slopes are noise
    if lowest <= first:
        return None
    return rates[lowest] / 10, rates[first + int(np.argmin(slopes[first : lowest + 1]))]


def _range_test(plan: Plan, *, seconds: float, say: Callable[[str], None]) -> tuple[list[float], list[float]]:
    loaders = build_loaders(plan, rank=0, say=say)
    rising = _Rising(plan.peak_learning_rate, seconds=seconds)
    unwanted = (Checkpoints, FiniteGuard)  # a loss that is no number ends the range, not the command
    callbacks = [one for one in build_callbacks(plan, Recorder(None), loaders[0]) if not isinstance(one, unwanted)]
    trainer = build_trainer(plan, loaders, callbacks=[*callbacks, rising], load_path=None)
    trainer.state.evaluators[0].eval_interval = lambda state, event: False
    try:
        trainer.fit()
    except Enough:
        pass
    finally:
        trainer.end()
    return rising.rates, rising.losses


class _Rising(Callback):
    """Sets each step's learning rate, after the recipe's schedule has; raises Enough at the end of the range."""

    def __init__(self, peak: float, *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._peak, self._seconds, self._clock = peak, seconds, clock
        self._started = 0.0
        self._timed = 0
        self._share = 0.0  # of the range, by now; it begins after a few timed steps at the lowest rate
        self._average = 0.0
        self._lowest = math.inf

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._timed == 1:
            self._started = self._clock()
        rate = self._peak * LOWEST * (HIGHEST / LOWEST) ** self._share
        for optimizer in state.optimizers:
            largest = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
            for group in optimizer.param_groups:
                share = float(group.get("initial_lr", group["lr"])) / largest
                if hasattr(group["lr"], "fill_"):
                    group["lr"].fill_(rate * share)
                else:
                    group["lr"] = rate * share
        self._rate = rate

    def batch_end(self, state: State, logger: Logger) -> None:
        self._timed += 1
        if self._timed <= _TIMED_STEPS:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        if not math.isfinite(loss):
            raise Enough
        self.rates.append(self._rate)
        self.losses.append(loss)
        self._average = 0.9 * self._average + 0.1 * loss
        average = self._average / (1 - 0.9 ** len(self.losses))
        self._lowest = min(self._lowest, average)
        if self._share >= 1 or (len(self.losses) > 10 and average > _EXPLODED * self._lowest):
            raise Enough
        self._share += (1 - self._share) / self._steps_left()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        state.timestamp = Timestamp()  # the first epoch again: its image size, its batch size

    def _steps_left(self) -> int:
        """Steps to the end of the range: as many as fit into what is left of the time at the mean pace so far."""
        taken, done = self._clock() - self._started, len(self.losses)
        fits = int((self._seconds - taken) / max(taken / (self._timed - 1), 1e-6))
        return max(1, _FEWEST_STEPS - done, min(_MOST_STEPS - done, fits))


def _text(recipe: Recipe, plan: Plan, found: Suggestion, prefix: Path) -> str:
    ratio = found.learning_rate / plan.peak_learning_rate
    per_256 = recipe.optimizer.get("learning_rate_per_256_images")
    key, value = "learning_rate", found.learning_rate
    if per_256 is not None:
        key, value = "learning_rate_per_256_images", per_256 * ratio
    return (
        f"suggested peak learning rate: {found.learning_rate:.3g} (optimizer.{key}={value:.3g}), {found.confidence}: "
        f"{len(BANDWIDTHS)} smoothings of 2 seeds read {found.low:.3g} to {found.high:.3g}\n"
        f"the recipe's: {plan.peak_learning_rate:.3g}, {1 / ratio:.2g} times the suggestion; measured at "
        f"{plan.epochs[0].image_size} px and {plan.epochs[0].global_batch_size} images a step, from a fresh network\n"
        f"written: {prefix}.png, {prefix}.json; the recipe and the run's folder are as they were"
    )


def _write(recipe: Recipe, plan: Plan, curves: dict[int, Any], found: Suggestion, prefix: Path) -> None:
    content = {
        "run_name": recipe.run_name,
        "suggested_learning_rate": found.learning_rate,
        "lowest_reading": found.low,
        "highest_reading": found.high,
        "confidence": found.confidence,
        "recipe_learning_rate": plan.peak_learning_rate,
        "seeds": {str(seed): {"learning_rate": rates, "loss": losses} for seed, (rates, losses) in curves.items()},
    }
    replace_file(Path(f"{prefix}.json"), lambda file: file.write(json.dumps(content, indent=1).encode()))
    replace_file(Path(f"{prefix}.png"), lambda file: _plot(recipe, plan, curves, found, file))


def _plot(recipe: Recipe, plan: Plan, curves: dict[int, Any], found: Suggestion, file: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (seed, (rates, losses)), color in zip(curves.items(), ("#4477aa", "#ee6677"), strict=True):
        axes.plot(rates, losses, color=color, alpha=0.25, linewidth=0.8)
        fitted = smoothed(rates, losses, bandwidth=BANDWIDTHS[1])[0]
        axes.plot(rates, fitted, color=color, label=f"seed {seed}, smoothed")
    axes.axvspan(found.low, found.high, color="#228833", alpha=0.12, label="readings")
    axes.axvline(found.learning_rate, color="#228833", label=f"suggested: {found.learning_rate:.3g}")
    axes.axvline(plan.peak_learning_rate, color="black", linestyle=":", label=f"recipe: {plan.peak_learning_rate:.3g}")
    ends = [smoothed(*curve, bandwidth=BANDWIDTHS[1])[0] for curve in curves.values()]
    lowest, first = min(one.min() for one in ends), max(one[0] for one in ends)
    axes.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=f"{recipe.run_name}: range test")
    axes.xaxis.set_major_formatter("{x:g}")  # powers would be drawn with fonts of TeX
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)
