"""The user's recipe: its keys, their checks, overrides, and the recipe at small scale."""

from training.recipe.flat import flat_keys
from training.recipe.keys import FSDP, Checkpoints, Data, EvalData, Expected, Logging, Parallelism, TrainData
from training.recipe.recipe import Recipe, load_recipe, recipe_from
from training.recipe.schema import RecipeError, users_mistake

__all__ = [
    "FSDP",
    "Checkpoints",
    "Data",
    "EvalData",
    "Expected",
    "Logging",
    "Parallelism",
    "Recipe",
    "RecipeError",
    "TrainData",
    "flat_keys",
    "load_recipe",
    "recipe_from",
    "users_mistake",
]
