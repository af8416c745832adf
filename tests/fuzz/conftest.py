"""Starts the fuzzing processes, and notes what came out for the table of `make fuzz`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_python

HERE = Path(__file__).parent
MOST_BYTES = 3 << 29  # of a process at its peak; the imports take a third


@pytest.fixture
def note(record_property: Callable[[str, Any], None]) -> Callable[[Counter[str]], None]:
    """Notes what came out, by kind, for the table."""

    def noted(outcomes: Counter[str]) -> None:
        told = ", ".join(f"{count:,} {kind}" for kind, count in outcomes.most_common())
        record_property("outcomes", f"{outcomes.total():,}: {told}")

    return noted


@pytest.fixture
def fuzzed(note: Callable[[Counter[str]], None], tmp_path: Path) -> Callable[..., Counter[str]]:
    """Runs a script of this folder over so many examples in a process of its own; returns what came out.

    Raises AssertionError, with what the process said, unless every example had an outcome that the script knows, within
    its seconds and its memory.
    """

    def fuzz(script: str, examples: int, *arguments: str, timeout: float) -> Counter[str]:
        done = run_python(str(HERE / script), str(examples), str(tmp_path), *arguments, timeout=timeout)
        assert done.returncode == 0, done.stderr[-6000:]
        told = json.loads(done.stdout.splitlines()[-1])
        outcomes = Counter(told["outcomes"])
        assert outcomes.total() >= examples
        assert told["peak_bytes"] < MOST_BYTES
        note(outcomes)
        return outcomes

    return fuzz


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`examples` of a test marked `examples(few, many)`: few in the suite, many in `make fuzz`."""
    marker = metafunc.definition.get_closest_marker("examples")
    if marker is not None:
        few, many = marker.args
        metafunc.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.exhaustive)], ids=str)
