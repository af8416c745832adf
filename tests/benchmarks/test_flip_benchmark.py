"""The benchmark of flips: its images are symmetric, its differences are taken seed by seed, and it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import run_python

from benchmarks.flip import KINDS, difference, make_images, table
from data.sources import digits, folder


def test_about_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    made = folder(path=make_images(tmp_path), split="train")
    drawn = digits(split="train", eval_fraction=0.5)
    assert len(made) == len(drawn) == 899
    originals = {drawn.image(index).tobytes() for index in range(len(drawn))}
    mirrored = {np.ascontiguousarray(drawn.image(index)[:, ::-1]).tobytes() for index in range(len(drawn))}
    found = [made.image(index).tobytes() for index in range(len(made))]
    assert all(one in originals or one in mirrored for one in found)
    assert 0.4 < np.mean([one in mirrored for one in found]) < 0.6
    assert make_images(tmp_path) == tmp_path / "mirrored_digits_1"
    assert not [*tmp_path.glob("*.partial")]


def test_differences_are_taken_seed_by_seed() -> None:
    runs = {
        kind: [{"seed": seed, "top1": value, "cpu_s": 1.0} for seed, value in enumerate(values)]
        for kind, values in zip(KINDS, ([0.90, 0.92, 0.94], [0.92, 0.92, 0.98], [0.8, 0.8, 0.8]), strict=True)
    }
    mean, error = difference(runs, "alternating")
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(2 / 3**0.5)  # deviations of 0, -2 and 2 points
    said = table({"runs": {"8": runs}})
    assert "| 8 | alternating | 94.00% | 92.00 92.00 98.00 | +2.00 ± 1.15 |" in said
    assert "| 8 | random | 92.00% | 90.00 92.00 94.00 |  |" in said


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(200)
def test_a_quick_run(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--quick", "--seeds", "1", "2", "--cache", str(tmp_path / "cache"), "--json", str(figures)]
    done = run_python("-m", "benchmarks.flip", *options, timeout=180)
    assert done.returncode == 0, done.stderr
    runs = json.loads(figures.read_text())["runs"]["2"]
    assert list(runs) == list(KINDS)
    assert [one["seed"] for one in runs["none"]] == [1, 2]
    assert runs["random"][0]["top1"] != runs["none"][0]["top1"]
