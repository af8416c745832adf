"""Top-1 at equal CPU-seconds: the medium recipe against the same without its speed-ups, trained for as long.

    python -m benchmarks.time_to_accuracy                                   # about 15 minutes on two cores
    python -m benchmarks.time_to_accuracy --only digits --seeds 0 1 2 3 4 --json figures.json
    python -m benchmarks.time_to_accuracy --quick                           # a minute: that it runs, no more

Two data sets that need no download: scikit-learn's handwritten digits, and `scenes`, 10 classes of JPEGs made of them:
a digit, enlarged, turned and tinted, over a cut of a real photo. The held-out digits are in the held-out scenes alone.

The medium recipe is trained as it stands, once a seed. The baseline is the same recipe with every algorithm off; its
epochs are as many as fit into the medium recipe's CPU-seconds, found from a calibration run, so that each is a whole
schedule of its own and neither is cut short. CPU-seconds are those of the whole process from the first step to the
last evaluation, all threads; conversion of the data and imports are not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import columns, hardware, progress, versions
from benchmarks.photos import find_photos
from data.sources import digits
from training.plan import without_algorithms
from training.recipe import Recipe, load_recipe
from training.session import train

RECIPE = Path(__file__).parents[1] / "yamls" / "digits_medium.yaml"
SCENE_SIDE_PX = 96
SCENES_VERSION = 1
# The medium recipe's phases at three times the digits' sizes.
SCENES = [
    "data.train.image_size=56",
    "data.eval.image_size=56",
    "data.eval.crop_ratio=1.0",
    "data.train.crop_scale=[0.5, 1.0]",
    "duration.epochs=24",
    "algorithms.progressive_resizing.stages="
    "[{epochs: 7, image_size: 32}, {epochs: 13, image_size: 48}, {epochs: 4, image_size: 56}]",
    "algorithms.fixres.image_size=56",
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
    """Train all of it, print the table, and write the JSON file that was asked for."""
    options = parse(arguments)
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
            if name == "scenes":
                overrides += [f"data.source={{name: folder, path: {make_scenes(cache)}}}", *SCENES]
            overrides += QUICK if options.quick else []
            last = {override.partition("=")[0]: override for override in overrides}  # no key may be given twice
            report["data"][name] = compare(name, list(last.values()), options.seeds)
    progress("")
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


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
    return parser.parse_args(arguments)


def compare(name: str, overrides: list[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Both recipes, once a seed, in turn."""
    medium = load_recipe(RECIPE, [*overrides, "run_name=warm_up", "seed=0"])
    progress(f"{name}: calibration")
    run(medium)  # converts the data and warms caches
    calibration = {"medium": run(medium), "baseline": run(without_algorithms(medium, "calibration"))}
    ratio = calibration["medium"]["cpu_s"] / calibration["baseline"]["cpu_s"]
    epochs = max(1, round(medium.epochs * ratio))
    runs: dict[str, list[dict[str, Any]]] = {"medium": [], "baseline": []}
    for seed in seeds:
        one = load_recipe(RECIPE, [*overrides, f"run_name=medium_{seed}", f"seed={seed}"])
        off = replace(without_algorithms(one, f"baseline_{seed}"), epochs=epochs)
        for kind, recipe in (("medium", one), ("baseline", off)):
            progress(f"{name}: {kind}, seed {seed}")
            runs[kind].append({"seed": seed} | run(recipe))
    return {
        "epochs": {"medium": medium.epochs, "baseline": epochs},
        "calibration": calibration,
        "runs": runs,
        "verdict": verdict(runs["medium"], runs["baseline"]),
    }


def run(recipe: Recipe) -> dict[str, float]:
    """Train `recipe`; returns top-1 of the last evaluation, CPU-seconds and seconds."""
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    cpu, wall = time.process_time(), time.perf_counter()
    result = train(recipe, say=lambda text: None)
    return {
        "top1": float(result.summary["top1"]),
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
    }


def verdict(medium: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """ahead or behind where every seed of one is above every seed of the other, else "not told apart"."""
    ours, theirs = ([one["top1"] for one in runs] for runs in (medium, baseline))
    if min(ours) > max(theirs):
        return "ahead"
    return "behind" if max(ours) < min(theirs) else "not told apart"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [["data", "recipe", "epochs", "CPU-s", "top-1 of each seed", "mean"]]
    for name, data in report["data"].items():
        for kind, runs in data["runs"].items():
            lines.append(
                [
                    name,
                    kind,
                    str(data["epochs"][kind]),
                    f"{statistics.median(one['cpu_s'] for one in runs):.1f}",
                    " ".join(f"{one['top1']:.2%}" for one in runs),
                    f"{statistics.mean(one['top1'] for one in runs):.2%}",
                ]
            )
    said = [f"{name}: medium is {data['verdict']}" for name, data in report["data"].items()]
    return "\n".join([columns(lines), "", *said])


# --- the scenes ------------------------------------------------------------------------------------------------------


def make_scenes(cache: Path) -> Path:
    """The folder of scenes, made where it is not there yet; whole or absent."""
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
    source = digits(split=split)
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
    background = photo[top : top + side, left : left + side].astype(np.float64)
    size = int(generator.integers(48, 80))
    stroke = Image.fromarray(digit[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
    stroke = stroke.rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (side, side))
    x, y = (int(v) for v in generator.integers(side - size + 1, size=2))
    canvas.paste(stroke, (x, y))
    opacity = np.asarray(canvas, dtype=np.float64)[..., None] / 255
    tint = generator.uniform(0, 255, 3)
    return Image.fromarray(np.round(background * (1 - opacity) + tint * opacity).astype(np.uint8))


if __name__ == "__main__":
    sys.exit(main())
