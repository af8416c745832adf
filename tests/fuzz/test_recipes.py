"""Recipes and overrides of any kind: a plan, or one line. Nothing is written, and time and memory stay bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1500)


@pytest.mark.examples(60, 5000)
def test_a_recipe_gives_a_plan_or_one_line(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("recipes.py", examples, timeout=1400)
    assert set(outcomes) <= {"a plan", "refused in one line"}
    assert outcomes["refused in one line"] > examples / 2
    assert outcomes["a plan"] > 0
