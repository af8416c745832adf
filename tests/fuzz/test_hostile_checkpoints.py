"""Hostile checkpoints: refused in one line, or read as data; no code runs, and memory stays bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1000)
KINDS = {f"{place}: {outcome}" for place in ("checked", "read", "exported", "model.weights")
         for outcome in ("data", "refused in one line")}  # fmt: skip


def test_bombs_code_and_wrong_shapes(fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("checkpoints.py", 1, "crafted", timeout=500)
    assert set(outcomes) == KINDS
    for place in ("read", "exported", "model.weights"):
        assert outcomes[f"{place}: refused in one line"] > outcomes[f"{place}: data"]


@pytest.mark.examples(60, 5000)
def test_mutants(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("checkpoints.py", examples, "mutants", timeout=900)
    assert set(outcomes) <= KINDS
    assert outcomes["read: refused in one line"] > examples / 4
