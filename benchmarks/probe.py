"""Predicted against actual time of whole runs: `run.py --probe`, then the run itself, in turn.

    python -m benchmarks.probe --json figures.json       # about 10 minutes of two quiet cores
    python -m benchmarks.probe --only digits --rounds 1  # a minute or two; checks that it works

The ratio is the predicted time over the actual one: 1 is right, above 1 the run was faster than predicted. The actual
time is `seconds` of summary.json: training, evaluations and checkpoints. Data are converted before. Another load on the
machine during one of the two changes the ratio, so the load is recorded before each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import columns, hardware, progress, versions
from data.whole_files import replace_file
from training.probing.probe import SECONDS, probe
from training.recipe import Recipe, load_recipe
from training.session import train

YAMLS = Path(__file__).parents[1] / "yamls"
SYNTHETIC = [
    "run_name=synthetic32",
    "data.source={name: synthetic, num_samples: 2048, num_classes: 10, image_size: 32}",
    "data.train.image_size=32",
    "data.eval.image_size=32",
    "duration.epochs=8",
    "algorithms.progressive_resizing.stages=[{epochs: 4, image_size: 24}, {epochs: 4, image_size: 32}]",
    "algorithms.fixres={epochs: 2, image_size: 32, learning_rate: 0.02}",
]
RESNET18 = [
    "run_name=resnet18",
    "model=resnet18",
    "data.source={name: synthetic, num_samples: 1280, num_classes: 10, image_size: 64}",
    "data.train.image_size=64",
    "data.eval.image_size=64",
    "duration.epochs=4",
    "algorithms.progressive_resizing.stages=[{epochs: 2, image_size: 48}, {epochs: 2, image_size: 64}]",
    "algorithms.fixres={epochs: 1, image_size: 64, learning_rate: 0.02}",
]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "digits": ("digits_medium.yaml", []),
    "synthetic32": ("digits_medium.yaml", SYNTHETIC),
    "resnet18": ("digits_medium.yaml", RESNET18),
    "resnet50_smoke": ("resnet50_medium.yaml", ["smoke=true"]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the requested file after each round."""
    options = _parser().parse_args(arguments)
    report = measure(options)
    print(table(report))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every round of every recipe."""
    torch.set_num_threads(options.threads)
    rounds: list[dict[str, Any]] = []
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"cores": os.cpu_count()},
        "versions": versions(("torch", "mosaicml", "numpy")),
        "settings": {"threads": options.threads, "probe_seconds": options.seconds},
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in options.only:
                progress(f"{name}, round {number + 1}")
                file, overrides = RECIPES[name]
                given = [f"results_dir={folder}/{number}", f"data.cache_dir={options.cache}"]
                recipe = load_recipe(YAMLS / file, [*overrides, *given, "logging.progress_bar=false"])
                rounds.append({"recipe": name, **predict_and_run(recipe, seconds=options.seconds)})
                if options.json is not None:  # after each, since all take long
                    replace_file(options.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    progress("")
    return report


def predict_and_run(recipe: Recipe, *, seconds: float) -> dict[str, Any]:
    """One prediction and the run that it is for, in seconds."""
    load = os.getloadavg()[0]
    report = probe(recipe, seconds=seconds, say=lambda text: None)
    load_between = os.getloadavg()[0]
    result = train(recipe, say=lambda text: None)
    total, actual = report.prediction.total, float(result.summary["seconds"])
    return {
        "predicted": round(total.mean, 2),
        "low": round(total.low, 2),
        "high": round(total.high, 2),
        "actual": round(actual, 2),
        "ratio": round(total.mean / actual, 3),
        "probe_took": round(report.took_seconds, 1),
        "load_before_probe": round(load, 1),
        "load_before_run": round(load_between, 1),
        "load_after_run": round(os.getloadavg()[0], 1),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line a round, then the median ratio of each recipe."""
    lines = [["recipe", "predicted", "range", "actual", "ratio", "within 10 %", "load"]]
    for one in report["rounds"]:
        lines.append(
            [
                one["recipe"],
                f"{one['predicted']:.1f} s",
                f"{one['low']:.1f} to {one['high']:.1f} s",
                f"{one['actual']:.1f} s",
                f"{one['ratio']:.2f}",
                "yes" if abs(one["ratio"] - 1) <= 0.1 else "no",
                f"{one['load_before_probe']:.1f}, {one['load_before_run']:.1f}, {one['load_after_run']:.1f}",
            ]
        )
    ratios: dict[str, list[float]] = {}
    for one in report["rounds"]:
        ratios.setdefault(one["recipe"], []).append(one["ratio"])
    medians = [
        f"{name}: median ratio {statistics.median(values):.2f}, {min(values):.2f} to {max(values):.2f}, n={len(values)}"
        for name, values in ratios.items()
    ]
    return "\n".join([columns(lines), "", *medians])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a probe's phases (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cache", default=".cache/brisk", metavar="FOLDER", help="where the data are made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
