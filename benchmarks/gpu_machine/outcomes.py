"""A pytest plugin that writes each test's outcome to a file as soon as it is known, one JSON object a line.

So the outcomes of a run that is killed at its time limit are kept, and the tests that it did not reach are known.
Load it with `-p benchmarks.gpu_machine.outcomes` and name the file in the environment variable BRISK_TEST_OUTCOMES.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

VARIABLE = "BRISK_TEST_OUTCOMES"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Name the tests that are going to run."""
    for item in session.items:
        _write({"test": item.nodeid, "outcome": "selected"})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure of its own."""
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "reason": str(report.longrepr)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test ends with its call, or where its set-up or tear-down fails or skips it."""
    if report.when == "call" or report.outcome != "passed":
        about = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        _write({**about, "reason": _reason(report)})


def _reason(report: pytest.TestReport) -> str:
    told: Any = report.longrepr
    if report.outcome == "skipped" and isinstance(told, tuple):
        return str(told[2]).removeprefix("Skipped: ")
    return "" if report.outcome == "passed" else str(told)


def _write(line: dict[str, Any]) -> None:
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
