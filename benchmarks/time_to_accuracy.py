"""Top-1 at equal CPU-seconds: the medium recipe against the same recipe without speed-ups, trained for as long.

    python -m benchmarks.time_to_accuracy --json figures.json --chart chart.png      # about 12 minutes of one core
    python -m benchmarks.time_to_accuracy --read figures.json --chart chart.png      # measure nothing
    python -m benchmarks.time_to_accuracy --quick                                    # a minute; checks that it runs

The two data sets need no download: scikit-learn's handwritten digits, and `scenes`, 10 classes of JPEGs made of them:
a digit, enlarged, rotated and tinted, over a crop of a real photo. Half of the digits are held out, so that one image
is 0.11 points of top-1 and training has few images; held-out digits appear only in held-out scenes.

The medium recipe is trained as it is, once per seed. The baseline is the same recipe with every algorithm off, for
enough epochs to take at least as many CPU-seconds as the medium run of the same seed: each run is a complete schedule,
none is cut short, and rounding up to whole epochs favors the baseline. CPU-seconds are those of all threads of the
process during the whole `train` call; conversion of the data and imports happen before and are not counted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import columns, hardware, progress, versions
from benchmarks.photos import find_photos
from data.sources import digits
from training.facts import data_facts
from training.planning import without_algorithms
from training.recipe import Recipe, load_recipe
from training.session import train

RECIPE = Path(__file__).parents[1] / "yamls" / "digits_medium.yaml"
HELD_OUT_SHARE = 0.5
SPARE = 1.03  # margin in the choice of the baseline's epochs, since CPU-seconds vary
COLORS = {"medium": "#1f6feb", "baseline": "#8a8f98"}
SCENE_SIDE_PX = 96
SCENES_VERSION = 3
# The medium recipe's phases at twice the digits' sizes.
SCENES = [
    "data.train.image_size=40",
    "data.eval.image_size=40",
    "data.train.crop_scale=[0.5, 1.0]",
    "duration.epochs=24",
    "algorithms.progressive_resizing.stages="
    "[{epochs: 7, image_size: 24}, {epochs: 13, image_size: 32}, {epochs: 4, image_size: 40}]",
    "algorithms.fixres.image_size=40",
]
QUICK = [
    "duration.epochs=3",
    "schedule.warmup_epochs=1",
    "algorithms.progressive_resizing.stages="
    "[{epochs: 1, image_size: 12}, {epochs: 1, image_size: 16}, {epochs: 1, image_size: 20}]",
    "algorithms.fixres.epochs=1",
    "algorithms.fixres.image_size=20",
    "data.train.image_size=20",
    "data.eval.image_size=20",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything, or read earlier measurements; print the table, and write the requested files."""
    options = parse(arguments)
    report = json.loads(options.read.read_text()) if options.read is not None else measure(options)
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart is not None:
        draw(report, options.chart)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_accuracy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=("digits", "scenes"), default=["digits", "scenes"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--threads", type=int, default=1, help="of torch; several spin and blur CPU-seconds")
    parser.add_argument("--cache", default=".cache/brisk", metavar="FOLDER", help="where the data are made")
    parser.add_argument("--quick", action="store_true", help="three epochs a run, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw them there; needs matplotlib")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of --json")
    options = parser.parse_args(arguments)
    if options.chart is not None and find_spec("matplotlib") is None:
        parser.error(f"--chart {options.chart}: it needs matplotlib; install that, or leave this out")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything requested, as written to the JSON file."""
    torch.set_num_threads(options.threads)
    cache = Path(options.cache)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(("torch", "mosaicml", "numpy", "scikit-learn")),
        "settings": {"seeds": options.seeds, "threads": options.threads, "quick": options.quick},
        "data": {},
    }
    with tempfile.TemporaryDirectory() as results:
        for name in options.only:
            overrides = [f"results_dir={results}", f"data.cache_dir={cache}", "logging.progress_bar=false"]
            overrides += ["checkpoints.keep_best=false", "device=cpu"]
            if name == "digits":
                overrides += [f"data.source.eval_fraction={HELD_OUT_SHARE}"]
            else:
                overrides += [f"data.source={{name: folder, path: {make_scenes(cache)}}}", *SCENES]
            overrides += QUICK if options.quick else []
            last = {override.partition("=")[0]: override for override in overrides}  # no key may be given twice
            report["data"][name] = compare(name, list(last.values()), options.seeds)
    progress("")
    return report


def compare(name: str, overrides: list[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Run both recipes once per seed, in turn."""
    calibrating = load_recipe(RECIPE, [*overrides, "run_name=calibration", "seed=0"])
    progress(f"{name}: calibration")
    off = without_algorithms(calibrating, "calibration")
    run(replace(off, epochs=2))  # converts the data and warms caches
    bare = run(off)
    runs: dict[str, list[dict[str, Any]]] = {"medium": [], "baseline": []}
    for seed in seeds:
        one = load_recipe(RECIPE, [*overrides, f"run_name=medium_{seed}", f"seed={seed}"])
        progress(f"{name}: medium, seed {seed}")
        runs["medium"].append({"seed": seed} | run(one))
        progress(f"{name}: baseline, seed {seed}")
        off = without_algorithms(one, f"baseline_{seed}")
        bare = train_for(
            runs["medium"][-1]["cpu_s"], lambda epochs, off=off: run(replace(off, epochs=epochs)), known=bare
        )
        runs["baseline"].append({"seed": seed} | bare)
    facts = data_facts(calibrating)
    return {
        "train_images": facts.num_train,
        "held_out_images": facts.num_eval,
        "runs": runs,
        "difference": difference(runs["medium"], runs["baseline"]),
        "verdict": verdict(runs["medium"], runs["baseline"]),
    }


def train_for(cpu_s: float, run_epochs: Callable[[int], dict[str, Any]], *, known: dict[str, Any]) -> dict[str, Any]:
    """`run_epochs` of enough epochs to take at least `cpu_s`, estimated from an earlier run, `known`.

    A run that turns out too short is discarded and replaced by one of more epochs.
    """
    epochs = _epochs_for(cpu_s, known)
    while (done := run_epochs(epochs))["cpu_s"] < cpu_s:
        epochs = max(epochs + 1, _epochs_for(cpu_s, done))
    return done


def _epochs_for(cpu_s: float, known: dict[str, Any]) -> int:
    return max(1, math.ceil(SPARE * cpu_s * known["epochs"] / known["cpu_s"]))


def run(recipe: Recipe) -> dict[str, Any]:
    """Train `recipe`; returns top-1 of the last evaluation, CPU-seconds, wall-clock seconds, and the curve."""
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    cpu, wall = time.process_time(), time.perf_counter()
    result = train(recipe, say=lambda text: None)
    cpu_s = time.process_time() - cpu
    return {
        "epochs": recipe.epochs,
        "top1": float(result.summary["top1"]),
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "curve": curve([(row["train_seconds"], row["eval_top1"]) for row in result.history.epochs], cpu_s),
    }


def curve(epochs: Sequence[tuple[float, float]], cpu_s: float) -> list[tuple[float, float]]:
    """(CPU-seconds, top-1) at each epoch's end, from (seconds of training, top-1) and the run's CPU-seconds.

    CPU-seconds are divided among epochs in proportion to their seconds of training, so only the last is measured.
    """
    ends = np.cumsum([seconds for seconds, _ in epochs])
    return [(round(float(end / ends[-1] * cpu_s), 2), top1) for end, (_, top1) in zip(ends, epochs, strict=True)]


def difference(medium: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, float]:
    """Top-1 of medium minus baseline, seed by seed: its mean, standard error, and in how many pairs it is above 0."""
    pairs = [ours["top1"] - theirs["top1"] for ours, theirs in zip(medium, baseline, strict=True)]
    spread = statistics.stdev(pairs) if len(pairs) > 1 else math.nan
    return {
        "mean": statistics.mean(pairs),
        "standard_error": spread / math.sqrt(len(pairs)),
        "above": sum(pair > 0 for pair in pairs),
    }


def verdict(medium: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """ahead or behind if every seed of one is above every seed of the other, else "not told apart"."""
    ours, theirs = ([one["top1"] for one in runs] for runs in (medium, baseline))
    if min(ours) > max(theirs):
        return "ahead"
    return "behind" if max(ours) < min(theirs) else "not told apart"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["data", "recipe", "epochs", "CPU-s", "top-1 of each seed", "mean"]]
    for name, data in report["data"].items():
        for kind, runs in data["runs"].items():
            lines.append(
                [
                    name,
                    kind,
                    " ".join(dict.fromkeys(str(one["epochs"]) for one in runs)),
                    " ".join(f"{one['cpu_s']:.1f}" for one in runs),
                    " ".join(f"{one['top1']:.2%}" for one in runs),
                    f"{statistics.mean(one['top1'] for one in runs):.2%}",
                ]
            )
    said = [
        f"{name}: medium is {data['verdict']}; higher by {100 * data['difference']['mean']:.2f} points, standard error "
        f"{100 * data['difference']['standard_error']:.2f}, and with {data['difference']['above']} of "
        f"{len(data['runs']['medium'])} seeds; one of {data['held_out_images']} held-out images is "
        f"{100 / data['held_out_images']:.2f}"
        for name, data in report["data"].items()
    ]
    return "\n".join([columns(lines), "", *said])


def draw(report: dict[str, Any], path: Path) -> None:
    """Top-1 against CPU-seconds: one line per run, with its last evaluation marked."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    panels = report["data"]
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, data) in zip(grid[0], panels.items(), strict=True):
        for kind, runs in data["runs"].items():
            for number, one in enumerate(runs):
                x, y = zip(*one["curve"], strict=True)
                label = f"{kind}, {len(runs)} seeds" if number == 0 else None
                axes.plot(x, [100 * value for value in y], color=COLORS[kind], linewidth=1.0, alpha=0.6, label=label)
                axes.plot(x[-1], 100 * y[-1], "o", color=COLORS[kind], markersize=5)
        last = [100 * one["top1"] for runs in data["runs"].values() for one in runs]
        best, worst = max(last), min(last)
        axes.set_ylim(worst - 4 * max(best - worst, 0.5), min(100.5, best + max(best - worst, 0.5)))
        axes.set_xlim(left=0)
        axes.set_title(
            f"{name}: {data['train_images']} training images, {data['held_out_images']} held out", fontsize=10
        )
        axes.set_xlabel("CPU-seconds")
        axes.set_ylabel("held-out top-1 (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- the scenes ------------------------------------------------------------------------------------------------------


def make_scenes(cache: Path) -> Path:
    """The folder of scenes, made if it does not exist yet; written completely or not at all."""
    folder = cache / f"scenes-v{SCENES_VERSION}"
    if not folder.is_dir():
        photos = [np.asarray(Image.open(path).convert("RGB")) for path in find_photos()]
        partial = Path(tempfile.mkdtemp(dir=_made(cache), prefix="scenes.partial-"))
        try:
            for split, name in (("train", "train"), ("eval", "val")):
                _write_scenes(partial / name, split, photos)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_scenes(folder: Path, split: str, photos: list[np.ndarray]) -> None:
    source = digits(split=split, eval_fraction=HELD_OUT_SHARE)
    for index in range(len(source)):
        generator = np.random.default_rng([SCENES_VERSION, split == "eval", index])
        path = _made(folder / source.class_names[source.label(index)]) / f"{index:05}.jpg"
        buffer = io.BytesIO()
        _scene(source.image(index), photos[generator.integers(len(photos))], generator).save(
            buffer, format="JPEG", quality=90
        )
        path.write_bytes(buffer.getvalue())


def _scene(digit: np.ndarray, photo: np.ndarray, generator: np.random.Generator) -> Image.Image:
    side = SCENE_SIDE_PX
    top, left = (int(generator.integers(length - side + 1)) for length in photo.shape[:2])
    background = photo[top : top + side, left : left + side] * generator.uniform(0.3, 0.6)  # so that digits stand out
    size = int(generator.integers(56, 88))
    stroke = Image.fromarray(digit[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
    stroke = stroke.rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (side, side))
    x, y = (int(v) for v in generator.integers(side - size + 1, size=2))
    canvas.paste(stroke, (x, y))
    opacity = np.asarray(canvas, dtype=np.float64)[..., None] / 255
    tint = generator.uniform(150, 255, 3)
    return Image.fromarray(np.round(background * (1 - opacity) + tint * opacity).astype(np.uint8))


if __name__ == "__main__":
    sys.exit(main())
