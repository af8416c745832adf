"""The effect of each algorithm alone on top-1 and CPU-seconds, against the same recipe and epochs without any.

    python -m benchmarks.effects --json figures.json --chart chart.png      # about 25 minutes of one core
    python -m benchmarks.effects --read figures.json --chart chart.png      # measure nothing
    python -m benchmarks.effects --quick --only mixup sam                   # checks that it runs

Data, network and schedule are those of `scenes` in benchmarks/time_to_accuracy.py. Each seed trains all algorithms in
turn, so differences are taken seed by seed. Settings are the medium recipe's if it has the algorithm, else the usual
ones of its page. None was tuned here: this shows whether an algorithm has an effect, and which, on a task of minutes.
It does not rank them for ImageNet, where training is long enough to need them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from algos.framework.registry import names
from benchmarks.measuring import columns, hardware, progress, versions
from benchmarks.time_to_accuracy import QUICK, RECIPE, SCENES, make_scenes, run
from training.recipe import Recipe, load_recipe

NONE = "none"
# Without patch_dropout, which leaves this network as it is; distillation learns from a run of `TEACHER`.
ALGORITHMS = [name for name in names() if name != "patch_dropout"]
TEACHER, TEACHER_WIDTH = "teacher", 32  # a run without algorithms, of twice the width; its seconds are not counted
# For algorithms that the medium recipe lacks, and those whose settings there are for other sizes or lengths.
SETTINGS = {
    "cutmix": "{alpha: 1.0}",
    "distillation": "{teacher: '${results_dir}/teacher'}",
    "ema": "{half_life_steps: 28}",  # two epochs
    "randaugment": "{num_ops: 1, magnitude: 9}",
    "selective_backprop": "{}",
    "stochastic_depth": "{drop_rate: 0.1}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything, or read earlier measurements; print the table, and write the requested files."""
    options = parse(arguments)
    report = merge([json.loads(path.read_text()) for path in options.read]) if options.read else measure(options)
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart is not None:
        draw(report, options.chart)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effects", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, metavar="ALGORITHM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--cache", default=".cache/brisk", metavar="FOLDER", help="where the data are made")
    parser.add_argument("--quick", action="store_true", help="three epochs a run, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw them there; needs matplotlib")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE",
        help="measure nothing, take the figures of one --json or of several with different seeds",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.chart is not None and find_spec("matplotlib") is None:
        parser.error(f"--chart {options.chart}: it needs matplotlib; install that, or leave this out")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything requested, as written to the JSON file."""
    torch.set_num_threads(1)
    cache = Path(options.cache)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (NONE, *options.only)}
    with tempfile.TemporaryDirectory() as results:
        scenes = [f"data.source={{name: folder, path: {make_scenes(cache)}}}", *SCENES]
        given = [*scenes, *(QUICK if options.quick else []), f"results_dir={results}", f"data.cache_dir={cache}"]
        given += ["logging.progress_bar=false", "checkpoints.keep_best=false", "device=cpu"]
        run(recipe_of(NONE, [*given, *QUICK]))  # converts the data and warms caches
        if "distillation" in runs:
            progress(TEACHER)
            run(recipe_of(NONE, [*given, f"model.width={TEACHER_WIDTH}"], run_name=TEACHER))
        for seed in options.seeds:
            for name, done in runs.items():
                progress(f"seed {seed}: {name}")
                measured = run(recipe_of(name, [*given, f"seed={seed}"]))
                done.append({"seed": seed, "top1": measured["top1"], "cpu_s": measured["cpu_s"]})
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(("torch", "mosaicml", "numpy")),
        "quick": options.quick,
        "runs": runs,
    }


def recipe_of(name: str, overrides: Sequence[str], *, run_name: str | None = None) -> Recipe:
    """The medium recipe with algorithm `name` alone, or with none. run_name: None for `name`."""
    given = [*overrides, f"run_name={run_name or name}", *others_off(name)]
    last = {override.partition("=")[0]: override for override in given}  # no key may be given twice
    return load_recipe(RECIPE, list(last.values()))


def others_off(name: str) -> list[str]:
    """Overrides that leave the medium recipe with algorithm `name` alone, or with none."""
    # One key per algorithm: turning the whole section off would also drop the settings of the one that stays.
    with_settings = set(load_recipe(RECIPE).algorithms)
    off = [f"algorithms.{other}=null" for other in sorted(with_settings - {name})]
    return off + ([f"algorithms.{name}={SETTINGS[name]}"] if name in SETTINGS else [])


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports of different seeds into one."""
    runs = {name: [one for report in reports for one in report["runs"][name]] for name in reports[0]["runs"]}
    return {**reports[0], "runs": runs}


def effect(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, float]:
    """`name` against none, seed by seed: points of top-1 with their standard error, and the ratio of CPU-seconds."""
    pairs = list(zip(runs[name], runs[NONE], strict=True))
    points = [100 * (one["top1"] - none["top1"]) for one, none in pairs]
    spread = statistics.stdev(points) if len(points) > 1 else math.nan
    return {
        "points": statistics.mean(points),
        "standard_error": spread / math.sqrt(len(points)),
        "cpu_ratio": statistics.median(one["cpu_s"] / none["cpu_s"] for one, none in pairs),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    runs = report["runs"]
    lines = [["algorithm", "top-1 of each seed", "over none, points", "CPU-seconds"]]
    for name, done in runs.items():
        against = effect(runs, name)
        lines.append(
            [
                name,
                " ".join(f"{one['top1']:.2%}" for one in done),
                "" if name == NONE else f"{against['points']:+.2f} ± {against['standard_error']:.2f}",
                "" if name == NONE else f"{against['cpu_ratio']:.2f}x",
            ]
        )
    return columns(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """One row per algorithm: the difference of each seed as a dot, their mean as a bar."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    runs = report["runs"]
    ranked = sorted((name for name in runs if name != NONE), key=lambda name: effect(runs, name)["points"])
    figure, axes = pyplot.subplots(figsize=(7, 0.38 * len(ranked) + 1.2), layout="constrained")
    axes.axvline(0, color="#8a8f98", linewidth=1)
    for row, name in enumerate(ranked):
        points = [100 * (one["top1"] - none["top1"]) for one, none in zip(runs[name], runs[NONE], strict=True)]
        axes.barh(row, statistics.mean(points), height=0.55, color="#1f6feb", alpha=0.35)
        axes.plot(points, [row] * len(points), "o", color="#1f6feb", markersize=4)
    labels = [f"{name}  ({effect(runs, name)['cpu_ratio']:.2f}x CPU-s)" for name in ranked]
    axes.set_yticks(range(len(ranked)), labels, fontsize=9)
    axes.set_xlabel("held-out top-1 over none, points; a dot is a seed")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
