"""Damaged .beton files: the right pixels, a clear error, or other pixels where no sidecar is there to tell by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1000)
ERROR, RIGHT, UNKNOWN = "a clear error", "right pixels", "other pixels, and no sidecar to tell by"


@pytest.mark.exhaustive
def test_every_number_at_its_extremes_and_every_block_cut_off(fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("betons.py", 0, "fields", timeout=600)
    assert outcomes[ERROR] > outcomes[RIGHT] > 0


@pytest.mark.examples(250, 10_000)
def test_flipped_bits(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("betons.py", examples, "flips", timeout=900)
    assert set(outcomes) <= {ERROR, RIGHT, UNKNOWN}
    assert outcomes[ERROR] > examples / 3


@pytest.mark.examples(100, 2000)
def test_sidecars_that_are_none(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    outcomes = fuzzed("betons.py", examples, "sidecars", timeout=900)
    assert outcomes[ERROR] > examples / 3
