"""A recipe's algorithms in the order in which they act, and the network as they change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from algos import LearningRate
from algos.framework.composer_algorithms import describe
from algos.framework.ordering import arrange
from algos.framework.registry import planner
from training.network import change_network, make_network, shapes_suffice
from training.recipe import Recipe, RecipeError, users_mistake

SCHEDULE = "learning_rate"  # an algorithm of every run; its settings are the recipe's section schedule
CLIPPING = "composer.gradient_clipping"  # what optimizer.clip_norm turns on


def arrange_algorithms(recipe: Recipe) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The recipe's algorithms for planning, in the order in which they act, and the settings of each."""
    settings = {SCHEDULE: recipe.schedule, **recipe.algorithms}
    made: dict[str, Any] = {SCHEDULE: LearningRate.for_planning(**recipe.schedule)}
    for name, given in recipe.algorithms.items():
        with users_mistake(f"algorithms.{name}"):
            made[name] = planner(name)(**given)
    clip_norm = recipe.optimizer["clip_norm"]
    if clip_norm is not None:
        if CLIPPING in made:
            raise RecipeError(
                "optimizer.clip_norm",
                f"is {clip_norm:g} beside algorithms.{CLIPPING}, which does the same; drop one",
            )
        made[CLIPPING] = describe(CLIPPING)
        settings[CLIPPING] = {"clipping_type": "norm", "clipping_threshold": clip_norm}
    with users_mistake("algorithms"):
        order = arrange({name: algorithm.contract for name, algorithm in made.items()})
    return {name: made[name] for name in order}, settings


def network_as_trained(recipe: Recipe, *, num_classes: int, shapes_only: bool = False) -> nn.Module:
    """The recipe's network as its algorithms change it. shapes_only: see `make_network`."""
    algorithms, _ = arrange_algorithms(recipe)
    shapes_only = shapes_only and shapes_suffice(algorithms)
    network = make_network(recipe, num_classes=num_classes, shapes_only=shapes_only)
    return change_network(network, recipe, algorithms)


def without_weights(recipe: Recipe) -> Recipe:
    """The same recipe with new weights, which need no download."""
    if recipe.model.get("weights") is None:
        return recipe
    return replace(recipe, model={**recipe.model, "weights": None})
