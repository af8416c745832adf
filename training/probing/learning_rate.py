"""`run.py -f RECIPE --find-lr`: a learning-rate range test of a recipe as it is (Smith 2017, arXiv 1506.01186).

The recipe trains with its own algorithms, batch size and precision, at its first epoch's image size, while the learning
rate rises exponentially from step to step until the loss explodes. Each seed's loss is smoothed in three ways, and each
curve gives two readings: a tenth of the rate at which the loss is lowest, and the rate at which it falls most steeply.
The suggestion is the geometric mean of the medians of the two; the spread of all readings says how sure it is.
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
from training.engines.start import start_distributed
from training.facts import data_facts
from training.guards.finite import FiniteGuard
from training.plan import Plan, choose_place, make_plan
from training.probing.measure import Enough, measured_recipe
from training.recipe import Recipe, RecipeError
from training.results.recorder import Recorder

SECONDS = 60.0  # for both seeds
LOWEST, HIGHEST = 1e-3, 1e2  # times the recipe's own peak rate
SMOOTHINGS = (0.8, 0.9, 0.95)  # weight of the past in the moving average
_TIMED_STEPS = 6
_FEWEST_STEPS, _MOST_STEPS = 40, 200
_EXPLODED = 4.0  # times the lowest smoothed loss so far
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
        for weight in SMOOTHINGS:
            reading = _readings(rates, smoothed(losses, weight=weight))
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


def smoothed(losses: Sequence[float], *, weight: float) -> list[float]:
    """Exponential moving average, corrected for its start at 0."""
    average, made = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        made.append(average / (1 - weight**step))
    return made


def _readings(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    lowest = int(np.argmin(losses))
    if lowest < 2:
        return None
    slopes = np.gradient(np.asarray(losses[: lowest + 1]), np.log(np.asarray(rates[: lowest + 1])))
    return rates[lowest] / 10, rates[int(np.argmin(slopes))]


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
        trainer.engine.close()
    return rising.rates, rising.losses


class _Rising(Callback):
    """Sets each step's learning rate, after the recipe's schedule has; raises Enough at the end of the range."""

    def __init__(self, peak: float, *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._peak, self._seconds, self._clock = peak, seconds, clock
        self._started = 0.0
        self._timed = 0
        self._steps: int | None = None  # of the whole range, known after a few timed steps at its lowest rate
        self._average = 0.0
        self._lowest = math.inf

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._timed == 1:
            self._started = self._clock()
        rate = self._peak * LOWEST * (HIGHEST / LOWEST) ** self._share()
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
        if self._steps is None:
            if self._timed > _TIMED_STEPS:
                each = (self._clock() - self._started) / (self._timed - 1)
                self._steps = min(_MOST_STEPS, max(_FEWEST_STEPS, int(self._seconds / max(each, 1e-6))))
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        if not math.isfinite(loss):
            raise Enough
        self.rates.append(self._rate)
        self.losses.append(loss)
        self._average = 0.9 * self._average + 0.1 * loss
        average = self._average / (1 - 0.9 ** len(self.losses))
        self._lowest = min(self._lowest, average)
        if len(self.losses) >= self._steps or (len(self.losses) > 10 and average > _EXPLODED * self._lowest):
            raise Enough

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        state.timestamp = Timestamp()  # the first epoch again: its image size, its batch size

    def _share(self) -> float:
        return 0.0 if self._steps is None else len(self.losses) / max(1, self._steps - 1)


def _text(recipe: Recipe, plan: Plan, found: Suggestion, prefix: Path) -> str:
    ratio = found.learning_rate / plan.peak_learning_rate
    per_256 = recipe.optimizer.get("learning_rate_per_256_images")
    key, value = "learning_rate", found.learning_rate
    if per_256 is not None:
        key, value = "learning_rate_per_256_images", per_256 * ratio
    return (
        f"suggested peak learning rate: {found.learning_rate:.3g} (optimizer.{key}={value:.3g}), {found.confidence}: "
        f"{len(SMOOTHINGS)} smoothings of 2 seeds read {found.low:.3g} to {found.high:.3g}\n"
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
        axes.plot(rates, smoothed(losses, weight=SMOOTHINGS[1]), color=color, label=f"seed {seed}, smoothed")
    axes.axvspan(found.low, found.high, color="#228833", alpha=0.12, label="readings")
    axes.axvline(found.learning_rate, color="#228833", label=f"suggested: {found.learning_rate:.3g}")
    axes.axvline(plan.peak_learning_rate, color="black", linestyle=":", label=f"recipe: {plan.peak_learning_rate:.3g}")
    ends = [smoothed(losses, weight=SMOOTHINGS[1]) for _, losses in curves.values()]
    lowest, first = min(min(one) for one in ends), max(one[0] for one in ends)
    axes.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=f"{recipe.run_name}: range test")
    axes.xaxis.set_major_formatter("{x:g}")  # powers would be drawn with fonts of TeX
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)
