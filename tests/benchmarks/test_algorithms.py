"""The benchmark of algorithms: it runs with and without its peers, and its arithmetic is right."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_python

from benchmarks.algorithm_variants import OURS, VARIANTS, Variant, baseline
from benchmarks.algorithms import Row, comparisons, goals
from benchmarks.measuring import median_interval, spread, verdict

ROOT = Path(__file__).parents[2]

# Runs the benchmark where nothing can import `blocked`.
RUN = """
import runpy, sys
blocked = {blocked!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Block())
sys.argv = ["benchmarks/algorithms.py", *{arguments!r}]
runpy.run_module("benchmarks.algorithms", run_name="__main__")
"""
ALL_PEERS = ("composer", "antialiased_cnns", "pytorch_optimizer")


def run(
    tmp_path: Path, *options: str, blocked: tuple[str, ...], only: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str, str]:
    """(what the JSON file says, stdout, stderr) of a quick run."""
    written = tmp_path / "deep" / "figures.json"
    arguments = ["--quick", "--device", "cpu", "--json", str(written), *options, *(["--only", *only] if only else [])]
    code = RUN.format(blocked=blocked, arguments=arguments)
    if blocked:  # from a process that has imported nothing
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150
        )  # fmt: skip
    else:
        done = run_python("-c", code, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(written.read_text()), done.stdout, done.stderr


@pytest.mark.exhaustive
@pytest.mark.timeout(170)
def test_every_variant_of_ours_runs_without_any_peer(tmp_path: Path) -> None:
    report, said, progress = run(tmp_path, "--fresh-memory", blocked=(*ALL_PEERS, "timm", "omegaconf", "ffcv"))
    assert set(report) == {
        "date", "hardware", "versions", "settings", "absent", "variants", "comparisons", "goals",
    }  # fmt: skip
    assert set(report["absent"]) == {*ALL_PEERS, "timm"}
    assert "composer is left out: ModuleNotFoundError: No module named 'composer'" in progress
    assert "round 2 of 2" in progress
    assert {row["who"] for row in report["variants"]} == {OURS, "torch", "torchvision"}
    assert {row["algorithm"] for row in report["variants"]} == {one.algorithm for one in VARIANTS if not one.vit_only}
    assert {one["cheapest_peer"] for one in report["comparisons"]} == {"torch", "torchvision"}
    assert report["goals"] == []
    for row in report["variants"]:
        assert set(row) == {"algorithm", "who", "how", "n", "gmac", "cost_ms", "wall_ms", "ratio_to_baseline"}
        assert row["n"] == 2
        assert row["cost_ms"]["min"] > 0
    assert report["versions"]["torch"]
    assert "label_smoothing, smooth_labels" in said


@pytest.mark.timeout(170)
def test_peers_stand_beside_ours(tmp_path: Path) -> None:
    for name in ALL_PEERS:
        pytest.importorskip(name)
    # Channels-last: in NCHW our blur of a map as small as these is a matrix product, which counts its zeros.
    only = ("blurpool", "blurpool_after", "sam")
    report, said, _ = run(tmp_path, "--memory-format", "channels_last", blocked=(), only=only)
    assert report["absent"] == {}
    assert {row["who"] for row in report["variants"]} == {OURS, *ALL_PEERS}
    assert len(report["goals"]) == 2
    assert "overhead at most 0.5 of Composer's" in said
    gmac = {(row["algorithm"], row["who"], row["how"]): row["gmac"] for row in report["variants"]}
    # The work is counted, so it is the same for the same arithmetic, and two passes are twice one.
    after = [value for (algorithm, _, _), value in gmac.items() if algorithm == "blurpool_after"]
    assert after[0] == pytest.approx(after[1], rel=1e-3)
    ours, composers = gmac["blurpool", OURS, "apply_blurpool"], gmac["blurpool", "composer", "apply_blurpool"]
    assert ours < composers
    assert gmac["sam", OURS, "sam_gradients, frozen_statistics"] == gmac["sam", "composer", "SAMOptimizer"]


def row(who: str, *, cost: list[float], how: str = "it", base: float = 100.0, algorithm: str = "blurpool") -> Row:
    made = Row(Variant(algorithm, who, how, baseline), lambda: None)
    made.cost_ms, made.baseline_ms = cost, [base] * len(cost)
    return made


def test_ours_is_compared_with_the_cheapest_peer_round_by_round() -> None:
    rows = [
        row(OURS, cost=[110, 220, 330] * 5),
        row("dear", cost=[200, 400, 600] * 5),
        row("cheap", cost=[100, 200, 300] * 5),
        row(OURS, cost=[1.0] * 15, algorithm="without_peers"),
    ]
    (one,) = comparisons(rows)
    assert one["cheapest_peer"] == "cheap"
    # Rounds of three different speeds, and no spread at all: the rounds are paired.
    assert one["ratio"]["min"] == one["ratio"]["max"] == 1.1
    assert one["verdict"] == "missed"


def test_blurpools_overhead_beside_composers() -> None:
    composers = row("composer", cost=[120.0] * 9)
    rows = [row(OURS, cost=[109.0] * 9, how="less"), row(OURS, cost=[111.0] * 9, how="more"), composers]
    less, more = goals(rows)
    assert (less["overhead"], less["composers_overhead"], less["verdict"]) == (0.09, 0.2, "met")
    assert (more["overhead"], more["verdict"]) == (0.11, "missed")
    assert goals(rows[:2]) == []


def test_a_goal_within_the_noise_is_open() -> None:
    assert verdict(spread([0.9, 1.1] * 10), 1.02) == "open"
    assert verdict(spread([0.9, 1.0] * 10), 1.02) == "met"
    assert verdict(spread([1.1, 1.2] * 10), 1.02) == "missed"


def test_the_interval_covers_the_true_median() -> None:
    generator = random.Random(0)
    for count in (6, 10, 25):
        low, high = median_interval(count)
        draws = (sorted(generator.gauss(0, 1) for _ in range(count)) for _ in range(2000))
        covered = statistics.mean(draw[low] <= 0 <= draw[high] for draw in draws)
        assert covered >= 0.94
    assert median_interval(1) == (0, 0)
    assert median_interval(5) == (0, 4)
