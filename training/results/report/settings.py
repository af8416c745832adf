"""Which settings of several runs' recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from training.recipe import flat_keys

_NOT_COMPARED = ("run_name", "results_dir")  # they differ between any two runs
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """A key of the recipe, and what each run has there as (value, details)."""

    key: str
    values: tuple[tuple[str, str], ...]


def differing_settings(recipes: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The keys whose values are not the same in all `recipes`, in the order of the recipes.

    An algorithm that a recipe leaves off is one row, whatever its settings are elsewhere.
    """
    toggled = _toggled_algorithms(recipes)
    differences = [Difference(f"algorithms.{name}", values) for name, values in toggled.items()]
    flat = [flat_keys({**recipe, "algorithms": _others(recipe, toggled)}) for recipe in recipes]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(key, _ABSENT) for settings in flat]
        # An empty section stands for itself: where another recipe fills it, the keys within it differ.
        empty = any(other.startswith(f"{key}.") for settings in flat for other in settings)
        if key not in _NOT_COMPARED and not empty and any(value != values[0] for value in values[1:]):
            differences.append(Difference(key, tuple((_shown(value), "") for value in values)))
    return differences


def _toggled_algorithms(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Algorithms that some recipes have on and others off -> (on or off, settings) of each recipe."""
    sections = [_algorithms(recipe) for recipe in recipes]
    names = dict.fromkeys(name for section in sections for name in section)
    rows = {}
    for name in names:
        settings = [section.get(name) for section in sections]
        if any(one is None for one in settings) and any(one is not None for one in settings):
            rows[name] = tuple(("off", "") if one is None else ("on", _details(one)) for one in settings)
    return rows


def _algorithms(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    section = recipe.get("algorithms")
    return section if isinstance(section, dict) else {}


def _others(recipe: Mapping[str, Any], toggled: Mapping[str, Any]) -> dict[str, Any]:
    # Of algorithms that are on in all recipes, each setting is compared; those off in all do not differ.
    return {name: one for name, one in _algorithms(recipe).items() if name not in toggled and one is not None}


def _details(settings: Any) -> str:
    if not isinstance(settings, dict):
        return _shown(settings)
    return ", ".join(f"{key} {_shown(value)}" for key, value in settings.items() if value is not None)


def _shown(value: Any) -> str:
    """A setting as YAML has it, on one line and without the keys that are null."""
    if value is _ABSENT:
        return "not set"
    style: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 10**6}
    text = yaml.safe_dump(_without_nulls(value), **style)
    return text.removesuffix("\n").removesuffix("\n...")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
