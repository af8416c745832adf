"""The effect of each algorithm alone on top-1 and CPU-seconds, against the same recipe and epochs without any.

    python -m benchmarks.effects --json figures.json --chart chart.png    # hours; the same command goes on after a stop
    python -m benchmarks.effects --only mixup sam --data digits --seeds 0 1 2 --jobs 2
    python -m benchmarks.effects --read figures.json --chart chart.png      # measure nothing
    python -m benchmarks.effects --quick --only mixup sam                   # checks that it runs

Both data sets are those of benchmarks/time_to_accuracy.py, as are network and schedule. Each seed trains all variants
in turn, so differences are taken seed by seed. Settings are the medium recipe's if it has the algorithm, else the usual
ones of its page. None was tuned here: this shows whether an algorithm has an effect, and which, on a task of minutes.
It does not rank them for ImageNet, where training is long enough to need them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from algos.framework.registry import names
from benchmarks.measuring import columns, hardware, progress, versions
from benchmarks.time_to_accuracy import HELD_OUT_SHARE, QUICK, RECIPE, SCENES, make_scenes, run
from data.whole_files import replace_file
from training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Variant:
    """One way to train: the medium recipe without its algorithms, and these overrides.

    algorithm: that is switched on, with the medium recipe's settings unless `overrides` have others.
    against: the variant that it is compared with; empty for one that others are compared with. of_data: further
        overrides for some data sets.
    """

    overrides: tuple[str, ...] = ()
    algorithm: str = ""
    against: str = ""
    of_data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


NONE, VIT = "none", "vit"
TEACHER, TEACHER_WIDTH = "teacher", 32  # a run without algorithms, of twice the width, which distillation learns from
# For algorithms that the medium recipe lacks, and those whose settings there are for other sizes or lengths.
SETTINGS = {
    "cutmix": "{alpha: 1.0}",
    "distillation": "{teacher: '${results_dir}/teacher'}",
    "ema": "{half_life_steps: 28}",  # two epochs
    "patch_dropout": "{keep_rate: 0.5, final_epochs: 3}",
    "randaugment": "{num_ops: 1, magnitude: 9}",
    "selective_backprop": "{}",
    "stochastic_depth": "{drop_rate: 0.1}",
}
ON_VIT = (  # with a patch side of 4 px: 64 patches
    "model=null", "model.name=vit_digits", "optimizer=null", "optimizer.name=adamw", "optimizer.learning_rate=0.002",
    "data.train.image_size=32", "data.eval.image_size=32",
)  # fmt: skip
FOR_VIT = ("patch_dropout",)  # which leave a convolutional network as it is


def _with_algorithm(name: str) -> Variant:
    settings = (f"algorithms.{name}={SETTINGS[name]}",) if name in SETTINGS else ()
    if name in FOR_VIT:
        return Variant((*ON_VIT, *settings), name, VIT)
    return Variant(settings, name, NONE)


def _with_optimizer(*settings: str) -> Variant:
    network = (one for one in ON_VIT if not one.startswith("optimizer"))
    return Variant((*network, "optimizer=null", *settings), against=VIT)


VARIANTS: dict[str, Variant] = {
    NONE: Variant(),
    VIT: Variant(ON_VIT),
    **{name: _with_algorithm(name) for name in names()},
    "vit, muon": _with_optimizer(
        "optimizer.name=muon",
        "optimizer.learning_rate=0.01",
        "optimizer.weight_decay=0.01",
        "optimizer.others={name: adamw, learning_rate: 0.002, weight_decay: 0.01}",
    ),
    "vit, schedule-free": _with_optimizer(
        "optimizer.name=schedule_free_adamw",
        "optimizer.learning_rate=0.005",
        "optimizer.weight_decay=0.01",
        "schedule.decay=constant",
    ),
    "progressive_resizing, sampled": Variant(
        ("algorithms.progressive_resizing.stages=null", "algorithms.progressive_resizing.final_epochs=4"),
        "progressive_resizing",
        NONE,
        {
            "digits": ("algorithms.progressive_resizing.sizes=[12, 16, 20]",),
            "scenes": ("algorithms.progressive_resizing.sizes=[24, 32, 40]",),
        },
    ),
}
DATA = ("digits", "scenes")
# Two-sided 95 % of Student's t distribution, by degrees of freedom from 1.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train everything, or read earlier measurements; print the table, and write the requested files."""
    options = parse(arguments)
    try:
        report = merge([json.loads(path.read_text()) for path in options.read]) if options.read else measure(options)
    except KeyboardInterrupt:
        kept = f"; the same command goes on from {options.json}" if options.json else ""
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    print(table(report))
    if options.chart is not None:
        draw(report, options.chart)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effects", description=(__doc__ or "").split("\n")[0])
    compared = [name for name, one in VARIANTS.items() if one.against]
    parser.add_argument(
        "--only", nargs="+", choices=compared, default=compared, metavar="VARIANT",
        help=f"of {', '.join(compared)}; what they are compared with is trained as well",
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*DATA])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(10)], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on one thread")
    parser.add_argument("--cache", default=".cache/brisk", metavar="FOLDER", help="where the data are made")
    parser.add_argument("--quick", action="store_true", help="three epochs a run, to see that it runs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there after each run; go on from those in it"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw them there; needs matplotlib")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE",
        help="measure nothing, take the figures of one --json or of several",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: it must be at least 1")
    if options.chart is not None and find_spec("matplotlib") is None:
        parser.error(f"--chart {options.chart}: it needs matplotlib; install that, or leave this out")
    for path in options.read or ([options.json] if options.json is not None and options.json.exists() else []):
        try:
            earlier = json.loads(path.read_text())
            assert earlier["data"].keys() <= {*DATA}
            made = earlier["made_with"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            parser.error(f"{path} holds no figures of this benchmark; give another file")
        if not options.read and made != made_with(options):
            parser.error(
                f"--json {path}: its figures were made with {made}, not {made_with(options)}; give another file"
            )
    return options


def made_with(options: argparse.Namespace) -> dict[str, Any]:
    """What figures must share to stand in one table."""
    return {**versions(("torch", "mosaicml", "numpy")), "quick": options.quick}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything requested and what is in the JSON file already, as written there after each run."""
    report = _report_to_go_on_from(options)
    todo = list(missing(report, options))
    began, done = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as results:
        prepare(options, results, {data for data, *_ in todo})
        for (data, name, seed), measured in _measured(todo, options, results):
            report["data"][data].setdefault(name, []).append({"seed": seed, **measured})
            if options.json is not None:
                replace_file(options.json, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
            done += 1
            left = (time.perf_counter() - began) / done * (len(todo) - done)
            progress(f"{done} of {len(todo)}: {data}, {name}, seed {seed}; {left / 60:.0f} min to go")
    progress("")
    return report


def missing(report: dict[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(data, variant, seed) of the runs that are asked for and not in the report, seed by seed."""
    references = [VARIANTS[name].against for name in options.only]
    for data in options.data:
        report["data"].setdefault(data, {})
    for seed in options.seeds:
        for data in options.data:
            for name in dict.fromkeys([*references, *options.only]):
                if seed not in [one["seed"] for one in report["data"][data].get(name, [])]:
                    yield data, name, seed


def prepare(options: argparse.Namespace, results: str, data: set[str]) -> None:
    """Convert the data once, before runs that may share the machine; and warm caches."""
    for name in data:
        given = overrides_of(name, options, results)
        run(recipe_of(NONE, [*given, *QUICK]))
        if "distillation" in options.only:
            progress(f"{name}: {TEACHER}, whose seconds are not counted")
            run(recipe_of(NONE, [*given, f"model.width={TEACHER_WIDTH}", f"run_name={TEACHER}"]))


def overrides_of(data: str, options: argparse.Namespace, results: str) -> list[str]:
    """What all variants of a data set share."""
    cache = Path(options.cache)
    if data == "digits":
        given = [f"data.source.eval_fraction={HELD_OUT_SHARE}"]
    else:
        given = [f"data.source={{name: folder, path: {make_scenes(cache)}}}", *SCENES]
    given += [*(QUICK if options.quick else []), f"results_dir={results}/{data}", f"data.cache_dir={cache}"]
    return [*given, "logging.progress_bar=false", "checkpoints.keep_best=false", "device=cpu"]


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe:
    """The medium recipe as variant `name`."""
    variant = VARIANTS[name]
    # One key per algorithm: turning the whole section off would also drop the settings of the one that stays.
    off = [f"algorithms.{other}=null" for other in load_recipe(RECIPE).algorithms if other != variant.algorithm]
    given = [f"run_name={name}", *overrides, *off, *variant.overrides]
    last = {override.partition("=")[0]: override for override in given}  # no key may be given twice
    return load_recipe(RECIPE, list(last.values()))


def _report_to_go_on_from(options: argparse.Namespace) -> dict[str, Any]:
    if options.json is not None and options.json.exists():
        return json.loads(options.json.read_text())
    about = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(torch.device("cpu"))}
    return {**about, "made_with": made_with(options), "data": {}}


def _measured(
    todo: Sequence[tuple[str, str, int]], options: argparse.Namespace, results: str
) -> Iterator[tuple[tuple[str, str, int], dict[str, float]]]:
    """Each run with what it measured, in the order in which they end."""
    shared = {data: overrides_of(data, options, results) for data in {data for data, *_ in todo}}

    def given(data: str, name: str) -> list[str]:
        return [*shared[data], *VARIANTS[name].of_data.get(data, ())]

    if options.jobs == 1:
        for data, name, seed in todo:
            yield (data, name, seed), _train(name, given(data, name), seed)
        return
    workers = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {
            workers.submit(_train, name, given(data, name), seed): (data, name, seed) for data, name, seed in todo
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        workers.shutdown(cancel_futures=True)


def _train(name: str, overrides: list[str], seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    done = run(recipe_of(name, [*overrides, f"seed={seed}", f"run_name={name}_{seed}"]))
    return {"top1": done["top1"], "cpu_s": done["cpu_s"]}


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports of different seeds, variants or data into one."""
    merged: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for report in reports:
        for data, runs in report["data"].items():
            for name, done in runs.items():
                merged.setdefault(data, {}).setdefault(name, []).extend(done)
    return {**reports[0], "data": merged}


def effect(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """A variant against the one that it is compared with, seed by seed.

    points: of top-1 in each seed both have, in the order of seeds, with their mean, its standard error, and whether
    Student's 95 % interval around the mean leaves out 0. without: the other variant's mean top-1 in these seeds.
    cpu_ratio: the median of the seeds' ratios of CPU-seconds.
    """
    reference = {one["seed"]: one for one in runs[VARIANTS[name].against]}
    measured = sorted((one for one in runs[name] if one["seed"] in reference), key=lambda one: one["seed"])
    pairs = [(one, reference[one["seed"]]) for one in measured]
    points = [100 * (one["top1"] - none["top1"]) for one, none in pairs]
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.nan
    quantile = (*_T_95, 1.96)[min(len(points) - 2, len(_T_95))] if len(points) > 1 else math.nan
    mean = statistics.mean(points)
    return {
        "points": points,
        "mean": mean,
        "standard_error": error,
        "told_apart": abs(mean) > quantile * error,
        "without": statistics.mean(none["top1"] for _, none in pairs),
        "cpu_ratio": statistics.median(one["cpu_s"] / none["cpu_s"] for one, none in pairs),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["data", "variant", "seeds", "mean top-1", "against", "points", "", "above in", "CPU-seconds"]]
    for data, runs in report["data"].items():
        for name in [one for one in VARIANTS if one in runs]:
            mean = f"{statistics.mean(one['top1'] for one in runs[name]):.2%}"
            line = [data, name, str(len(runs[name])), mean]
            if VARIANTS[name].against:
                found = effect(runs, name)
                points = found["points"]
                line += [VARIANTS[name].against, mean_text(found)]
                line += ["told apart" if found["told_apart"] else ""]
                line += [f"{sum(one > 0 for one in points)} of {len(points)}", f"{found['cpu_ratio']:.2f}x"]
            lines.append(line + [""] * (len(lines[0]) - len(line)))
    return columns(lines)


def mean_text(found: dict[str, Any]) -> str:
    """The mean of an `effect` in points, with its standard error if there are two seeds or more."""
    error = f" ± {found['standard_error']:.2f}" if len(found["points"]) > 1 else ""
    return f"{found['mean']:+.2f}{error}"


def draw(report: dict[str, Any], path: Path) -> None:
    """A panel for each data set, a row for each variant: each seed's difference as a dot, their mean as a bar."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    panels = {data: _ranked(runs) for data, runs in report["data"].items()}
    rows = max(len(found) for found in panels.values())
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(7.5 * len(panels), 0.38 * rows + 1.4), layout="constrained", squeeze=False
    )
    for axes, (data, ranked) in zip(grid[0], panels.items(), strict=True):
        axes.axvline(0, color="#8a8f98", linewidth=1)
        for row, found in enumerate(ranked.values()):
            color = "#1f6feb" if found["told_apart"] else "#8a8f98"
            axes.barh(row, found["mean"], height=0.55, color=color, alpha=0.35)
            axes.plot(found["points"], [row] * len(found["points"]), "o", color=color, markersize=3)
        labels = [f"{name}  ({found['cpu_ratio']:.2f}x CPU-s)" for name, found in ranked.items()]
        axes.set_yticks(range(len(ranked)), labels, fontsize=9)
        axes.set_title(f"{data}; a dot is a seed, blue: told apart from 0", fontsize=10)
        axes.set_xscale("symlog", linthresh=1)  # a network that learns little has effects of tens of points
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        axes.set_xlabel("points of top-1 over the same recipe without it")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _ranked(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found = {name: effect(runs, name) for name in runs if VARIANTS[name].against}
    return dict(sorted(found.items(), key=lambda item: item[1]["mean"]))


if __name__ == "__main__":
    sys.exit(main())
