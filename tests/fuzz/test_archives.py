"""Damaged and hostile tar shards, Parquet, Arrow and CSV files: images, or a line that says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(1000)


def check(outcomes: Counter[str]) -> None:
    assert set(outcomes) <= {"read", "read, with odd ones", "refused"}
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0


@pytest.mark.examples(150, 5000)
def test_tars(examples: int, fuzzed: Callable[..., Counter[str]]) -> None:
    check(fuzzed("archives.py", examples, "tars", timeout=900))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", ["parquets", "arrows", "csvs"])
def test_tables_and_lists(part: str, fuzzed: Callable[..., Counter[str]]) -> None:
    check(fuzzed("archives.py", 3000, part, timeout=900))
