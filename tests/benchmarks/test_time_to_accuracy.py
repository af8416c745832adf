"""The benchmark of top-1 at equal CPU-seconds: it runs, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import run_python

from benchmarks.time_to_accuracy import HELD_OUT_SHARE, curve, difference, make_scenes, table, train_for, verdict
from data.sources import digits, folder


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_quick_run_trains_both_recipes_on_both_data_sets(tmp_path: Path) -> None:
    figures, chart = tmp_path / "deep" / "figures.json", tmp_path / "chart.png"
    command = ["-m", "benchmarks.time_to_accuracy"]
    options = ["--quick", "--seeds", "3", "--cache", str(tmp_path / "cache"), "--json", str(figures)]
    done = run_python(*command, *options, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert set(report) == {"date", "hardware", "versions", "settings", "data"}
    assert set(report["data"]) == {"digits", "scenes"}
    for data in report["data"].values():
        assert (data["train_images"], data["held_out_images"]) == (899, 898)
        (medium,), (baseline,) = data["runs"]["medium"], data["runs"]["baseline"]
        assert medium["seed"] == baseline["seed"] == 3
        assert baseline["cpu_s"] >= medium["cpu_s"] > 0
        for one in (medium, baseline):
            assert len(one["curve"]) == one["epochs"]
            assert one["curve"][-1] == pytest.approx([one["cpu_s"], one["top1"]], abs=0.01)
        assert f"{medium['top1']:.2%}" in done.stdout
    again = run_python(*command, "--read", str(figures), "--chart", str(chart), timeout=60)
    assert again.stdout == done.stdout
    assert Image.open(chart).size[0] > 1000


def costing(seconds_an_epoch: list[float], trained: list[int]) -> Any:
    """A run whose epochs cost the next of `seconds_an_epoch`; `trained` gets the epochs of each."""

    def run(epochs: int) -> dict[str, Any]:
        trained.append(epochs)
        return {"epochs": epochs, "cpu_s": epochs * seconds_an_epoch[len(trained) - 1]}

    return run


def test_the_baseline_takes_at_least_as_long() -> None:
    trained: list[int] = []
    done = train_for(10.0, costing([0.5], trained), known={"epochs": 30, "cpu_s": 15.0})
    assert trained == [21]  # 3 % more than 20, rounded up
    assert done["cpu_s"] == 10.5


def test_a_baseline_that_was_short_is_trained_anew_for_more_epochs() -> None:
    trained: list[int] = []
    done = train_for(10.0, costing([0.4, 0.45, 0.45], trained), known={"epochs": 30, "cpu_s": 15.0})
    assert trained == [21, 26]  # at 0.4 seconds 26 are due
    assert done["cpu_s"] >= 10.0
    trained.clear()
    train_for(10.0, costing([0.47, 0.42, 0.5], trained), known={"epochs": 30, "cpu_s": 15.0})
    assert trained == [21, 22, 25]  # one more at least, or it could go on for ever


def test_one_is_ahead_where_its_worst_seed_beats_the_others_best() -> None:
    def runs(*top1: float) -> list[dict[str, Any]]:
        return [{"top1": value} for value in top1]

    assert verdict(runs(0.97, 0.98), runs(0.96, 0.969)) == "ahead"
    assert verdict(runs(0.95, 0.94), runs(0.96, 0.97)) == "behind"
    assert verdict(runs(0.97, 0.98), runs(0.90, 0.97)) == "not told apart"


def test_the_difference_is_paired() -> None:
    ours, theirs = [{"top1": t} for t in (0.90, 0.95, 0.92)], [{"top1": t} for t in (0.88, 0.91, 0.92)]
    found = difference(ours, theirs)
    assert found["mean"] == pytest.approx(0.02)
    assert found["standard_error"] == pytest.approx(0.02 / 3**0.5)  # deviations of 0, 0.02 and -0.02
    assert found["above"] == 2


def test_the_curve_ends_at_what_was_measured() -> None:
    assert curve([(1.0, 0.2), (3.0, 0.5)], 8.0) == [(2.0, 0.2), (8.0, 0.5)]


def test_the_table_says_all_of_it() -> None:
    one = {"seed": 0, "epochs": 5, "top1": 0.975, "cpu_s": 9.96, "wall_s": 12.0, "curve": [[9.96, 0.975]]}
    runs = {"medium": [one], "baseline": [{**one, "epochs": 4, "top1": 0.9, "cpu_s": 10.04}]}
    apart = {"mean": 0.075, "standard_error": 0.01, "above": 1}
    data = {"train_images": 900, "held_out_images": 400, "runs": runs, "difference": apart, "verdict": "ahead"}
    said = table({"data": {"digits": data}})
    assert "digits  medium    5       10.0   97.50%              97.50%" in said
    assert "digits  baseline  4       10.0   90.00%              90.00%" in said
    assert said.endswith(
        "digits: medium is ahead; higher by 7.50 points, standard error 1.00, and with 1 of 1 seeds; "
        "one of 400 held-out images is 0.25"
    )


def test_scenes_are_of_the_digits_and_split_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = make_scenes(tmp_path)
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*.jpg"))
    assert make_scenes(tmp_path) == path  # made once
    assert sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*.jpg")) == before
    for split in ("train", "eval"):
        scenes, drawn = folder(path, split=split), digits(split=split, eval_fraction=HELD_OUT_SHARE)
        labels = sorted(scenes.label(i) for i in range(len(scenes)))
        assert labels == sorted(drawn.label(i) for i in range(len(drawn)))
        assert scenes.class_names == drawn.class_names
        assert scenes.image(0).shape == (96, 96, 3)
    assert not np.array_equal(folder(path, split="train").image(0), folder(path, split="eval").image(0))
