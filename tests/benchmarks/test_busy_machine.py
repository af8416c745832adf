"""The benchmark of a busy machine: it runs, ends the processes it starts, and its table shows the measurements."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil
import pytest
from ranks import run_python

from benchmarks.busy_machine import DEFAULT, SETTINGS, busy_loops, table


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(200)
def test_a_quick_run_measures_every_setting(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = ["-m", "benchmarks.busy_machine"]
    done = run_python(*command, "--quick", "--json", str(figures), timeout=180)
    assert done.returncode == 0, done.stderr
    runs = json.loads(figures.read_text())["runs"]
    assert [(one["setting"], one["loops"]) for one in runs] == [(name, 0) for name in SETTINGS]
    assert all(min(one["images_per_second"], one["cpu_ms_per_step"]) > 0 for one in runs)
    again = run_python(*command, "--read", str(figures), timeout=60)
    assert again.stdout == done.stdout


def test_busy_loops_end_whatever_happens() -> None:
    before = set(psutil.Process().children())
    with contextlib.suppress(KeyboardInterrupt), busy_loops(2):
        loops = set(psutil.Process().children()) - before
        assert len(loops) == 2
        raise KeyboardInterrupt
    assert not any(loop.is_running() for loop in loops)


def test_the_table_compares_turns_of_a_round() -> None:
    speeds = {DEFAULT: [1000.0, 2000.0, 4000.0], "no spins": [500.0, 1500.0, 1000.0]}
    runs = [
        {"setting": name, "loops": loops, "images_per_second": speed / (1 + loops), "cpu_ms_per_step": 9.0}
        for loops in (0, 2)
        for name, of_turns in speeds.items()
        for speed in of_turns
    ]
    said = table({"runs": runs}).splitlines()
    assert said[2].split() == ["0", "no", "spins", "1,000", "0.50", "0.38", "to", "0.62", "9.0"]
    assert said[3].split() == ["2", *DEFAULT.split(), "667", "1.00", "1.00", "to", "1.00", "9.0"]
