"""Trains the runs of an ablation one after the other, within a budget, going on where an earlier call stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.utils import dist

from training.ablation.variants import ALL, COST, EPOCHS, NONE, PlannedRun, Variant, plan_variant
from training.recipe import Recipe, RecipeError
from training.results.text import format_seconds, format_top1
from training.session import train


@dataclass
class Ablation:
    """results: of the runs that are done. refused: variants that cannot run, with the reason. left: runs not done."""

    results: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left: int = 0


def carry_out(
    recipe: Recipe,
    variants: Sequence[Variant],
    *,
    equals: Sequence[str],
    seeds: int,
    budget_seconds: float | None,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Ablation:
    """Train every variant with every seed; seeds are the outer loop, so that a small budget covers all variants.

    recipe: its results_dir is the ablation's folder. A run whose summary.json is there is not trained again, one that
    was interrupted goes on from its last checkpoint.
    budget_seconds: no run is begun that would probably end later; its time is taken from the runs that were done.
    """
    made, started, pace = Ablation(), clock(), _Pace()
    planned = list(_planned(recipe, variants, equals=equals, seeds=seeds, made=made))
    for index, run in enumerate(planned):
        done = _result(run)
        if done is None:
            left = None if budget_seconds is None else budget_seconds - (clock() - started)
            if _agreed(left is not None and pace.seconds(run.macs) > left):
                made.left += 1
                continue
            began = clock()
            train(run.recipe, say=_silent)
            pace.add(run.macs, clock() - began)
            done = _result(run)
            assert done is not None, "a run that returned has a summary"
            eta = sum(pace.seconds(one.macs) for one in planned[index + 1 :] if _result(one) is None)
            say(
                f"{index + 1}/{len(planned)}  {run.recipe.run_name}: top-1 {format_top1(done['top1'])} after "
                f"{done['epochs']} epochs, {format_seconds(done['train_seconds'])}  ETA {format_seconds(eta)}"
            )
        made.results.append(done)
    return made


def _planned(
    recipe: Recipe, variants: Sequence[Variant], *, equals: Sequence[str], seeds: int, made: Ablation
) -> Iterator[PlannedRun]:
    for seed in range(recipe.seed, recipe.seed + seeds):
        for equal in equals:
            for variant in variants:
                if variant.name in made.refused or (variant.name == NONE and equal == COST and EPOCHS in equals):
                    continue  # the cost of none is that of its own epochs: the same run
                try:
                    yield plan_variant(recipe, variant, equal=equal, seed=seed)
                except RecipeError as error:
                    if variant.name in (ALL, NONE):
                        raise  # the recipe itself cannot run
                    made.refused[variant.name] = str(error)


def _result(run: PlannedRun) -> dict[str, Any] | None:
    """What summary.json of a finished run says; None if it is not done. Raises RecipeError if it was another run."""
    path: Path = run.recipe.run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecipeError("", f"{path} is damaged ({error}); remove that run's folder") from None
    if summary["epochs"] != run.recipe.epochs or sorted(summary["algorithms"]) != sorted(run.recipe.algorithms):
        raise RecipeError(
            "", f"{run.recipe.run_dir} is of another ablation; give another folder with results_dir=DIR, or remove it"
        )
    return {
        "variant": run.variant.name,
        "algorithms": list(run.variant.algorithms),
        "equal": run.equal,
        "seed": run.seed,
        "epochs": summary["epochs"],
        "top1": summary["top1"],
        "loss": summary["loss"],
        "train_seconds": summary["train_seconds"],
        "seconds": summary["seconds"],
        "macs": run.macs,
        "folder": run.recipe.run_name,
    }


class _Pace:
    """Predicts a run's seconds from its arithmetic and the runs before it."""

    def __init__(self) -> None:
        self._seconds = self._macs = 0.0

    def add(self, macs: float, seconds: float) -> None:
        self._seconds, self._macs = self._seconds + seconds, self._macs + macs

    def seconds(self, macs: float) -> float:
        return macs * self._seconds / self._macs if self._macs else 0.0


def _agreed(decision: bool) -> bool:
    """Rank 0's decision, on every rank: their clocks differ."""
    return bool(dist.all_gather_object(decision)[0])


def _silent(text: str) -> None:
    """In place of print: an ablation says one line a run."""


def with_shared_runs(results: Sequence[dict[str, Any]], equals: Sequence[str]) -> list[dict[str, Any]]:
    """`results`, with `none` also at equal cost, where it is the same run and was not trained twice."""
    if COST not in equals or EPOCHS not in equals:
        return list(results)
    return [*results, *({**one, "equal": COST} for one in results if one["variant"] == NONE)]
