"""The range test: readings of curves whose answer is known, and one real test of a tiny recipe."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.probing.learning_rate import Suggestion, find_learning_rate, smoothed, suggestion

ROOT = Path(__file__).parents[3]


def curve(*, falls_at: float, explodes_at: float, steps: int = 400) -> tuple[list[float], list[float]]:
    """A loss that falls around one rate and explodes at another."""
    rates = np.geomspace(1e-4, 10, steps)
    fall = 2 / (1 + (rates / falls_at) ** 3)
    return rates.tolist(), (fall + (rates / explodes_at) ** 4).tolist()


def test_the_suggestion_lies_between_the_fall_and_the_explosion() -> None:
    found = suggestion([curve(falls_at=0.05, explodes_at=2.0)] * 2)
    assert 0.02 < found.learning_rate < 0.3
    assert found.low <= found.learning_rate <= found.high


def test_the_suggestion_moves_with_the_curve() -> None:
    one, ten = (suggestion([curve(falls_at=0.01 * scale, explodes_at=0.4 * scale)]) for scale in (1, 10))
    assert ten.learning_rate / one.learning_rate == pytest.approx(10, rel=0.25)


def test_a_loss_that_never_falls_gives_no_suggestion() -> None:
    with pytest.raises(ValueError, match="the loss never fell"):
        suggestion([([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])])


@pytest.mark.parametrize(("high", "words"), [(2.9, "sure"), (9.0, "fairly sure"), (11.0, "not sure")])
def test_confidence_follows_the_spread_of_the_readings(high: float, words: str) -> None:
    assert Suggestion(2.0, 1.0, high).confidence == words


def test_smoothing_is_a_weighted_least_squares_line_at_every_rate() -> None:
    rates, losses = np.geomspace(1e-3, 1, 30), np.random.default_rng(0).uniform(1, 2, 30)
    values, slopes = smoothed(rates, losses, bandwidth=0.3)
    x = np.log10(rates)
    for at, value, slope in zip(x, values, slopes, strict=True):
        expected = np.polyfit(x - at, losses, 1, w=np.exp(-0.25 * ((x - at) / 0.3) ** 2))  # polyfit squares its weights
        assert [slope, value] == pytest.approx(expected.tolist())


def test_a_short_noisy_test_that_falls_again_after_the_explosion_is_read_before_it() -> None:
    # A ResNet-18 on 1,000 classes: MixUp's noise, 40 steps over five decades, and a network that collapses at the end.
    rates = np.geomspace(6.4e-5, 6.4, 40)
    fall = 7.1 - 0.15 / (1 + (0.004 / rates) ** 2)
    burst = 1.2 * np.exp(-(((np.log10(rates) - np.log10(0.6)) / 0.4) ** 2)) - 0.1 * (rates > 3)
    noise = [np.random.default_rng(seed).normal(0, 0.06, 40) for seed in range(2)]
    found = suggestion([(rates.tolist(), (fall + burst + one).tolist()) for one in noise])
    assert 3e-4 < found.low < found.high < 0.05


@pytest.mark.timeout(300)
def test_a_range_test_of_a_recipe_writes_its_plot_and_nothing_else(short_recipe: Any) -> None:
    recipe = short_recipe()
    recipe.results_dir.mkdir()
    text = find_learning_rate(recipe, seconds=0.1, say=lambda text: None)
    prefix = recipe.results_dir / f"{recipe.run_name}_lr_range"
    assert {path.name for path in recipe.results_dir.iterdir()} == {f"{prefix.name}.png", f"{prefix.name}.json"}
    found = json.loads(Path(f"{prefix}.json").read_text())
    assert found["recipe_learning_rate"] == recipe.optimizer["learning_rate"]
    assert f"optimizer.learning_rate={found['suggested_learning_rate']:.3g}" in text
    for seed in found["seeds"].values():
        rates = np.asarray(seed["learning_rate"])
        assert rates[0] == pytest.approx(1e-3 * found["recipe_learning_rate"])
        assert np.diff(np.log(rates)) == pytest.approx(math.log(1e5) / 39, rel=1e-3)  # the fewest steps: 40
        assert len(seed["loss"]) == len(rates) > 10


@pytest.mark.timeout(240)
def test_ctrl_c_ends_with_130_and_nothing_written(overrides: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-f", "yamls/digits_medium.yaml", "--find-lr", *overrides]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert any("range test with seed" in line for line in process.stdout)  # stops reading at the first
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "run.py: stopped; nothing is written" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "results").exists()
