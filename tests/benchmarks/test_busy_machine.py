"""The benchmark of a busy machine: it runs, ends the processes it starts, and its table shows the measurements."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.busy_machine import busy_loops, table

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_quick_run_trains_what_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.busy_machine"]
    done = subprocess.run(
        [*command, "--quick", "--only", "one thread", "--json", str(figures)],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(figures.read_text())["runs"]
    assert (one["environment"], one["loops"]) == ("one thread", 0)
    assert min(one["images_per_second"], one["cpu_s"], one["wall_s"]) > 0
    assert 0 <= one["otherwise_busy"] < 1
    again = subprocess.run([*command, "--read", str(figures)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout


def test_busy_loops_end_whatever_happens() -> None:
    before = set(psutil.Process().children())
    with contextlib.suppress(KeyboardInterrupt), busy_loops(2):
        loops = set(psutil.Process().children()) - before
        assert len(loops) == 2
        raise KeyboardInterrupt
    assert not any(loop.is_running() for loop in loops)


def test_the_table_says_all_of_it() -> None:
    kinds = [("a", 0, 2400.0, 0.01), ("a", 2, 170.0, 0.5), ("a", 0, 2500.0, 0.0), ("a", 0, 2300.0, 0.02)]
    runs = [
        {"environment": name, "loops": loops, "images_per_second": speed, "cpu_s": 9.0, "otherwise_busy": busy}
        for name, loops, speed, busy in kinds
    ]
    said = table({"runs": runs}).splitlines()
    assert said[1].split() == ["0", "a", "2,400", "2,400", "2,500", "2,300", "9.0", "1%", "0%", "2%"]
    assert said[2].split() == ["2", "a", "170", "170", "9.0", "50%"]
