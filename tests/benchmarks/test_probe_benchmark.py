"""The table of benchmarks/probe.py, from figures that are known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.probe import RECIPES, YAMLS, table
from training.recipe import load_recipe


def one(recipe: str, *, predicted: float, actual: float) -> dict[str, Any]:
    return {
        "recipe": recipe, "predicted": predicted, "low": 0.5 * predicted, "high": 2 * predicted, "actual": actual,
        "ratio": predicted / actual, "load_before_probe": 1.0, "load_before_run": 2.0, "load_after_run": 3.0,
    }  # fmt: skip


def test_the_table_says_which_rounds_are_within_ten_percent() -> None:
    lines = table({"rounds": [one("a", predicted=10.8, actual=10), one("a", predicted=8, actual=10)]}).splitlines()
    assert [line.split()[-4] for line in lines[1:3]] == ["yes", "no"]
    assert lines[-1] == "a: median ratio 0.94, 0.80 to 1.08, n=2"


@pytest.mark.parametrize("name", RECIPES)
def test_its_recipes_are_valid(name: str) -> None:
    file, overrides = RECIPES[name]
    assert load_recipe(YAMLS / file, overrides).epochs >= 2
