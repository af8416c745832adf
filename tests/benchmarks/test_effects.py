"""The benchmark of each algorithm alone: it runs, one algorithm at a time, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import run_python

from benchmarks.effects import ALGORITHMS, NONE, effect, merge, recipe_of, table

ROOT = Path(__file__).parents[2]


def runs(*top1: float, cpu_s: float = 10.0) -> list[dict[str, Any]]:
    return [{"seed": seed, "top1": value, "cpu_s": cpu_s} for seed, value in enumerate(top1)]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_quick_run_trains_what_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    command = ["-m", "benchmarks.effects"]
    options = ["--only", "channels_last", "cutmix", "--seeds", "3", "--cache", str(tmp_path / "cache")]
    done = run_python(*command, "--quick", *options, "--json", str(figures), "--chart", str(chart), timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert list(report["runs"]) == [NONE, "channels_last", "cutmix"]
    for measured in report["runs"].values():
        assert [one["seed"] for one in measured] == [3]
        assert measured[0]["cpu_s"] > 0
        assert f"{measured[0]['top1']:.2%}" in done.stdout
    assert Image.open(chart).size[0] > 500
    again = run_python(*command, "--read", str(figures), timeout=60)
    assert again.stdout == done.stdout


@pytest.mark.parametrize("name", [NONE, *ALGORITHMS])
def test_a_recipe_has_one_algorithm_or_none(name: str) -> None:
    assert list(recipe_of(name, ["seed=1"]).algorithms) == ([] if name == NONE else [name])


def test_the_effect_is_taken_seed_by_seed() -> None:
    found = effect({NONE: runs(0.90, 0.92, 0.94), "sam": runs(0.92, 0.92, 0.98, cpu_s=20.0)}, "sam")
    assert found["points"] == pytest.approx(2.0)
    assert found["standard_error"] == pytest.approx(2 / 3**0.5)  # deviations of 0, -2 and 2 points
    assert found["cpu_ratio"] == 2


def test_reports_of_other_seeds_are_joined() -> None:
    both = merge([{"date": "a", "runs": {NONE: runs(0.5)}}, {"date": "b", "runs": {NONE: runs(0.6)}}])
    assert both == {"date": "a", "runs": {NONE: runs(0.5) + runs(0.6)}}


def test_the_table_says_all_of_it() -> None:
    said = table({"runs": {NONE: runs(0.90, 0.92), "ema": runs(0.91, 0.95, cpu_s=10.5)}})
    assert "none       90.00% 92.00%" in said
    assert "ema        91.00% 95.00%       +2.00 ± 1.00       1.05x" in said
