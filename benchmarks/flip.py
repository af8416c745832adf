"""Top-1 with alternating, random and no flips, on images for which a flip is a symmetry.

    OMP_NUM_THREADS=1 python -m benchmarks.flip --json figures.json --table figures.md      # 10 minutes of one core
    python -m benchmarks.flip --read figures.json                         # measure nothing
    python -m benchmarks.flip --quick --seeds 0                           # checks that it runs

The images are scikit-learn's handwritten digits, each mirrored or not by a coin of its own, in training and held out:
so a class has as many images of the one kind as of the other, as photographs of animals do, and a mirrored 2 is a 2.
Half of them are held out, one image being 0.11 points. The network is that of digits_medium.yaml, at 16 px, with every
speed-up off. Each seed trains all kinds in turn, and differences to random flips are taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import hardware, progress, versions
from benchmarks.time_to_accuracy import HELD_OUT_SHARE, RECIPE, run
from data.sources import digits
from training.planning import without_algorithms
from training.recipe import Recipe, load_recipe

KINDS = ("random", "alternating", "none")
BASELINE = "random"
VERSION = 1  # of the images
SETTINGS = [
    "data.train.image_size=16", "data.eval.image_size=16", "data.train.flip_probability=0.5",
    "schedule.warmup_epochs=1", "logging.progress_bar=false", "checkpoints.keep_best=false", "device=cpu",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything, or read earlier measurements; print the table, and write the requested files."""
    options = parse(arguments)
    report = json.loads(options.read.read_text()) if options.read is not None else measure(options)
    print(table(report))
    for path, text in ((options.json, json.dumps(report, indent=1)), (options.table, table(report))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flip", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)), metavar="SEED")
    parser.add_argument("--epochs", nargs="+", type=int, default=[8, 24], metavar="N", help="lengths of the runs")
    parser.add_argument("--cache", default=".cache/brisk", metavar="FOLDER", help="where the data are made")
    parser.add_argument("--quick", action="store_true", help="two epochs a run, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table there as well")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of --json")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything requested, as written to the JSON file."""
    torch.set_num_threads(1)
    cache, lengths = Path(options.cache), [2] if options.quick else options.epochs
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {str(epochs): {kind: [] for kind in KINDS} for epochs in lengths}
    with tempfile.TemporaryDirectory() as results:
        images = make_images(cache)
        for epochs in lengths:
            for seed in options.seeds:
                for kind in KINDS:
                    progress(f"{epochs} epochs, seed {seed}: {kind}")
                    given = [f"seed={seed}", f"duration.epochs={epochs}", f"results_dir={results}"]
                    measured = run(recipe_of(kind, images, [*given, f"data.cache_dir={cache}"]))
                    runs[str(epochs)][kind].append({"seed": seed, "top1": measured["top1"], "cpu_s": measured["cpu_s"]})
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(("torch", "mosaicml", "numpy", "scikit-learn")),
        "quick": options.quick,
        "runs": runs,
    }


def recipe_of(kind: str, images: Path, overrides: Sequence[str]) -> Recipe:
    """The digits recipe without speed-ups, on `images`, with flips of that kind."""
    source = f"data.source={{name: folder, path: {images}}}"
    given = [source, *SETTINGS, f"data.train.flip={kind}", f"run_name={kind}", *overrides]
    return without_algorithms(load_recipe(RECIPE, given), kind)


def make_images(cache: Path) -> Path:
    """The folder of image files; made once, whole or not at all."""
    folder = cache / f"mirrored_digits_{VERSION}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for split, name in (("train", "train"), ("eval", "val")):
            source = digits(split=split, eval_fraction=HELD_OUT_SHARE)
            coins = np.random.default_rng([VERSION, split == "eval"]).random(len(source)) < 0.5
            for index, mirror in enumerate(coins):
                pixels = source.image(index)[:, ::-1] if mirror else source.image(index)
                path = partial / name / source.class_names[source.label(index)] / f"{index:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(pixels)).save(path)
        partial.rename(folder)
    return folder


def difference(runs: dict[str, list[dict[str, Any]]], kind: str) -> tuple[float, float]:
    """Points of top-1 of `kind` over random flips, seed by seed: their mean and its standard error."""
    points = [100 * (one["top1"] - base["top1"]) for one, base in zip(runs[kind], runs[BASELINE], strict=True)]
    spread = statistics.stdev(points) if len(points) > 1 else math.nan
    return statistics.mean(points), spread / math.sqrt(len(points))


def table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown."""
    lines = [
        "| epochs | flips | top-1, mean | top-1 of each seed | over random flips, points |",
        "|---|---|---|---|---|",
    ]
    for epochs, runs in report["runs"].items():
        for kind, done in runs.items():
            mean, error = difference(runs, kind)
            each = " ".join(f"{100 * one['top1']:.2f}" for one in done)
            top1 = statistics.mean(one["top1"] for one in done)
            over = "" if kind == BASELINE else f"{mean:+.2f} ± {error:.2f}"
            lines.append(f"| {epochs} | {kind} | {top1:.2%} | {each} | {over} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
