"""The benchmark of run.py's start-up: it runs, and its arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_python

from benchmarks.startup import COMPOSER, FIRST_STEP, RECIPES, TORCH, Case, cases_of, over_torch, run, table

ROOT = Path(__file__).parents[2]


def report(**cpu_s: list[float]) -> dict[str, Any]:
    goals = {"help": (0.2, False), "plan": (3.0, True)}
    cases = {
        {"torch": TORCH, "composer": COMPOSER, "step": FIRST_STEP}.get(name, name): {
            "goal": goals.get(name, (None, True))[0],
            "over_torch": goals.get(name, (None, True))[1],
            "cpu_s": values,
            "wall_s": [2 * value for value in values],
        }
        for name, values in cpu_s.items()
    }
    return {"cases": cases}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_quick_run_measures_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figures = tmp_path / "figures.json"
    command = ["-m", "benchmarks.startup"]
    done = run_python(*command, "--quick", "--recipes", "digits_medium", "--json", str(figures), timeout=280)
    assert done.returncode == 0, done.stderr
    cases = json.loads(figures.read_text())["cases"]
    assert list(cases) == [case.name for case in cases_of(["digits_medium"], tmp_path)]
    assert all(len(case["cpu_s"]) == len(case["wall_s"]) == 1 for case in cases.values())
    assert cases["run.py --help"]["cpu_s"] < cases[TORCH]["cpu_s"] < cases[COMPOSER]["cpu_s"]
    again = run_python(*command, "--read", str(figures), timeout=60)
    assert again.stdout == done.stdout


def test_a_process_is_waited_for_and_its_time_counted(tmp_path: Path) -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nraise SystemExit(2)"
    cpu, wall = run(Case("spins", (sys.executable, "-c", spin), status=2), tmp_path)
    assert cpu > 0.29
    assert wall > 0.29
    with pytest.raises(RuntimeError, match=r"ended with status 1: .*no such luck"):
        run(Case("fails", (sys.executable, "-c", "print('no such luck'); raise SystemExit(1)")), tmp_path)


def test_every_recipe_is_planned(tmp_path: Path) -> None:
    named = [case.name for case in cases_of(RECIPES, tmp_path)]
    assert [f"--plan {path.stem}" for path in sorted((ROOT / "yamls").glob("*.yaml"))] == named[7:-1]


def test_a_case_is_compared_round_by_round() -> None:
    found = over_torch(report(torch=[2.0, 4.0, 3.0], plan=[5.0, 7.0, 5.5]), "plan")
    assert found == [3.0, 3.0, 2.5]


def test_the_table_says_what_met_its_goal() -> None:
    said = table(
        report(torch=[2.0, 2.2], composer=[12.0, 12.0], help=[0.05, 0.07], plan=[4.5, 5.8], step=[9.0, 9.5])
    ).splitlines()
    assert "help" in said[3]
    assert said[3].split()[1:] == ["0.06", "0.05,", "0.07", "-2.04", "0.12", "at", "most", "0.2", "in", "all", "met"]
    assert said[4].split() == ["plan", "5.15", "4.50,", "5.80", "+3.05", "10.30", "at", "most", "3", "more", "open"]
    assert said[-1] == (
        "the first training step is done after 9.25 CPU-seconds, 2.75 before a plain import of Composer"
    )
