"""The benchmark of each algorithm alone: it runs, one algorithm at a time, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import run_python

from algos.framework.registry import names
from benchmarks.effects import DATA, NONE, VARIANTS, VIT, effect, main, merge, parse, recipe_of, table

ROOT = Path(__file__).parents[2]


def runs(*top1: float, cpu_s: float = 10.0) -> list[dict[str, Any]]:
    return [{"seed": seed, "top1": value, "cpu_s": cpu_s} for seed, value in enumerate(top1)]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_quick_run_trains_what_was_asked_for_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    command = ["-m", "benchmarks.effects", "--quick", "--cache", str(tmp_path / "cache"), "--json", str(figures)]
    command += ["--only", "channels_last", "patch_dropout"]
    done = run_python(*command, "--data", "digits", "--seeds", "3", timeout=280)
    assert done.returncode == 0, done.stderr
    first = json.loads(figures.read_text())["data"]["digits"]
    assert list(first) == [NONE, VIT, "channels_last", "patch_dropout"]
    for measured in first.values():
        assert [one["seed"] for one in measured] == [3]
        assert measured[0]["cpu_s"] > 0
        assert f"{measured[0]['top1']:.2%}" in done.stdout
    wider = ["--seeds", "3", "4", "--jobs", "2", "--chart", str(chart)]
    done = run_python(*command, *wider, timeout=280)
    assert done.returncode == 0, done.stderr
    both = json.loads(figures.read_text())["data"]
    assert list(both) == ["digits", "scenes"]
    for name, measured in both["digits"].items():
        assert measured[0] == first[name][0]  # not trained again
    for one in both.values():
        assert {name: sorted(run["seed"] for run in measured) for name, measured in one.items()} == {
            name: [3, 4] for name in first
        }
    assert Image.open(chart).size[0] > 1000
    again = run_python(*command[:2], "--read", str(figures), timeout=60)
    assert again.stdout == done.stdout


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_has_one_algorithm_or_none(name: str) -> None:
    variant = VARIANTS[name]
    made = recipe_of(name, ["seed=1", "results_dir=there", *variant.of_data.get("digits", ())])
    assert list(made.algorithms) == ([variant.algorithm] if variant.algorithm else [])


def test_every_algorithm_is_compared_with_the_same_network_without_it() -> None:
    assert {one.algorithm for one in VARIANTS.values()} == {"", *names()}
    for name, variant in VARIANTS.items():
        if variant.algorithm:
            with_it = recipe_of(name, ["seed=1", "results_dir=there", *variant.of_data.get("digits", ())])
            without = recipe_of(variant.against, ["seed=1"])
            assert (with_it.model, with_it.epochs) == (without.model, without.epochs)


def test_the_effect_is_taken_seed_by_seed() -> None:
    measured = {NONE: runs(0.90, 0.92, 0.94, 0.9), "sam": runs(0.92, 0.92, 0.98, cpu_s=20.0)[::-1]}
    found = effect(measured, "sam")
    assert found["points"] == pytest.approx([2.0, 0.0, 4.0])
    assert found["mean"] == pytest.approx(2.0)
    assert found["standard_error"] == pytest.approx(2 / 3**0.5)  # deviations of 0, -2 and 2 points
    assert found["without"] == pytest.approx(0.92)  # of the seeds that both have
    assert found["cpu_ratio"] == 2
    assert not found["told_apart"]  # 2.0 is less than 4.303 times 1.155


def test_a_mean_beyond_students_interval_is_told_apart() -> None:
    reference = runs(*[0.9] * 3)
    assert effect({NONE: reference, "sam": runs(0.92, 0.921, 0.919)}, "sam")["told_apart"]
    assert not effect({NONE: reference[:1], "sam": runs(0.99)}, "sam")["told_apart"]


def test_reports_of_other_seeds_and_data_are_joined() -> None:
    one = {"date": "a", "data": {"digits": {NONE: runs(0.5)}}}
    other = {"date": "b", "data": {"digits": {NONE: runs(0.6)}, "scenes": {NONE: runs(0.7)}}}
    both = {"digits": {NONE: runs(0.5) + runs(0.6)}, "scenes": {NONE: runs(0.7)}}
    assert merge([one, other]) == {"date": "a", "data": both}


def test_the_table_says_all_of_it() -> None:
    said = table({"data": {"digits": {NONE: runs(0.90, 0.92), "ema": runs(0.91, 0.95, cpu_s=10.5)}}})
    none, ema = (line.split() for line in said.splitlines()[1:])
    assert none == ["digits", "none", "2", "91.00%"]
    assert ema == ["digits", "ema", "2", "93.00%", "none", "+2.00", "±", "1.00", "2", "of", "2", "1.05x"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "holds no figures of this benchmark"),
        ('{"data": {}, "made_with": {"torch": "1.0"}}', "its figures were made with {'torch': '1.0'}"),
    ],
)
def test_figures_of_another_kind_are_not_gone_on_from(written: str, said: str, tmp_path: Path, capsys) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text(written)
    with pytest.raises(SystemExit, match="2"):
        parse(["--json", str(figures)])
    assert said in capsys.readouterr().err
    assert figures.read_text() == written


def test_what_is_read_is_not_measured(tmp_path: Path, capsys) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"made_with": {}, "data": {DATA[0]: {NONE: runs(0.5), "sam": runs(0.6)}}}))
    assert main(["--read", str(figures)]) == 0
    out = capsys.readouterr().out
    assert "+10.00 " in out
    assert "±" not in out  # one seed has no standard error
