"""The runs of an ablation: which algorithms each has, and how long it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.planning import Plan, plan_run
from training.recipe import Recipe, RecipeError, recipe_from

EPOCHS, COST = "epochs", "cost"  # what the variants have in common
NONE, ALL = "none", "all"


@dataclass(frozen=True)
class Variant:
    """A set of algorithms. name: none, all, `without X` or `X alone`."""

    name: str
    algorithms: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """A variant with a seed, trained as long as `equal` says: as many epochs as the recipe, or at the cost of none."""

    variant: Variant
    equal: str
    seed: int
    recipe: Recipe
    macs: float  # multiply-adds of the whole run, backward passes included


def variants_of(algorithms: Sequence[str]) -> list[Variant]:
    """None and all first, so that a small budget has both ends; then each left out, then each alone."""
    names = tuple(algorithms)
    if not names:
        raise ValueError("the recipe has no algorithm to leave out; add one with --add mixup='{alpha: 0.2}'")
    found = [Variant(NONE, ()), Variant(ALL, names)]
    if len(names) > 2:  # of two, leaving one out leaves the other alone
        found += [Variant(f"without {name}", tuple(one for one in names if one != name)) for name in names]
    if len(names) > 1:
        found += [Variant(f"{name} alone", (name,)) for name in names]
    return found


def plan_variant(recipe: Recipe, variant: Variant, *, equal: str, seed: int) -> PlannedRun:
    """The run of a variant. Raises RecipeError if its algorithms cannot run without the others."""
    epochs = recipe.epochs
    made = _recipe(recipe, variant, epochs=epochs, seed=seed, equal=equal)
    plan = plan_run(made)
    if equal == COST and variant.algorithms:
        target = plan_run(_recipe(recipe, Variant(NONE, ()), epochs=epochs, seed=seed, equal=equal)).total_macs
        epochs = _epochs_that_cost(target, recipe, variant, plan, seed=seed)
        made = _recipe(recipe, variant, epochs=epochs, seed=seed, equal=equal)
        plan = plan_run(made)
    return PlannedRun(variant, equal, seed, made, plan.total_macs)


def stretched(settings: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """A recipe's settings with its phases in proportion to the new number of epochs, each an epoch or more.

    Raises RecipeError if there are fewer epochs than phases.
    """
    share = epochs / settings["duration"]["epochs"]
    algorithms, schedule = dict(settings["algorithms"]), settings["schedule"]
    fixres, resizing = algorithms.get("fixres"), algorithms.get("progressive_resizing")
    if fixres:
        algorithms["fixres"] = {**fixres, "epochs": max(1, round(fixres["epochs"] * share))}
    if resizing and resizing.get("stages"):
        stages = resizing["stages"]
        lengths = _shared_out(epochs, [stage["epochs"] for stage in stages])
        stages = [{**stage, "epochs": length} for stage, length in zip(stages, lengths, strict=True)]
        algorithms["progressive_resizing"] = {**resizing, "stages": stages}
    return {
        **settings,
        "algorithms": algorithms,
        "duration": {**settings["duration"], "epochs": epochs},
        "schedule": {
            **schedule,
            "warmup_epochs": schedule["warmup_epochs"] * share,
            "milestones_epochs": [epoch * share for epoch in schedule["milestones_epochs"]],
            "points": [[epoch * share, factor] for epoch, factor in schedule["points"]],
        },
    }


def _recipe(recipe: Recipe, variant: Variant, *, epochs: int, seed: int, equal: str) -> Recipe:
    settings = recipe.settings
    # Null, not absent: so a recipe's own file may be laid over it again.
    algorithms = {name: given if name in variant.algorithms else None for name, given in settings["algorithms"].items()}
    name = variant.name.replace(" ", "_").replace(".", "_")
    return recipe_from(
        {
            **stretched({**settings, "algorithms": algorithms}, epochs),
            "seed": seed,
            "run_name": f"{name}-{equal}-seed{seed}",
            "load": None,
            "autoresume": True,
            "on_nan": "continue",  # a variant that diverges is a result, not the end of the others
        }
    )


def _epochs_that_cost(target: float, recipe: Recipe, variant: Variant, plan: Plan, *, seed: int) -> int:
    """The number of epochs whose arithmetic is nearest to `target`; phases round, so it is searched, not divided."""
    guess = max(1, round(plan.recipe.epochs * target / plan.total_macs))
    found: dict[int, float] = {}
    for epochs in range(max(1, guess - 2), guess + 3):
        try:
            made = _recipe(recipe, variant, epochs=epochs, seed=seed, equal=COST)
            found[epochs] = abs(plan_run(made).total_macs - target)
        except RecipeError:  # fewer epochs than stages
            continue
    return min(found, key=lambda epochs: found[epochs]) if found else plan.recipe.epochs


def _shared_out(total: int, lengths: Sequence[int]) -> list[int]:
    """`total` epochs in proportion to `lengths`, each 1 or more."""
    if total < len(lengths):
        raise RecipeError(
            "algorithms.progressive_resizing.stages", f"has {len(lengths)} stages, more than the {total} epochs"
        )
    whole = sum(lengths)
    ends = [round(total * sum(lengths[: index + 1]) / whole) for index in range(len(lengths))]
    made: list[int] = []
    for index, end in enumerate(ends):
        begin = sum(made)
        latest = total - (len(lengths) - index - 1)
        made.append(min(max(end, begin + 1), latest) - begin)
    return made
