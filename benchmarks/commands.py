"""What each command about a run takes: evaluate, predict, report, export, demo, and before it --probe and --find-lr.

    python -m benchmarks.commands --json figures.json    # about 15 minutes of two quiet cores
    python -m benchmarks.commands --only digits          # 10 classes, a small network; a few minutes

Two runs are trained first: `digits`, the demo's recipe on 10 classes of 8x8 images, and `classes1000`, a ResNet-18 with
BlurPool, EMA and FixRes at 64 px on an image folder of 1,000 synthetic classes. Every command is a fresh process that
starts with nothing computed. Goal: at most 60 s each on two cores. Wall-clock seconds depend on the machine's load,
CPU-seconds hardly do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import columns, cost_of_process, hardware, progress, versions
from data.whole_files import replace_file
from training.exporting.formats import FORMATS

ROOT = Path(__file__).parents[1]
GOAL_SECONDS = 60.0
NUM_CLASSES, TRAIN_IMAGES, EVAL_IMAGES = 1000, 5, 3  # images a class
STORED_PX, SIZE_PX = 72, 64
LIBRARIES = ("torch", "torchvision", "mosaicml", "torchmetrics", "matplotlib", "onnx", "onnxruntime", "gradio")
PREDICTED_IMAGES = 100

CLASSES_1000 = [
    "model=resnet18",
    f"data.train.image_size={SIZE_PX}",
    f"data.eval.image_size={SIZE_PX}",
    "data.train.per_device_batch_size=64",
    "data.eval.per_device_batch_size=128",
    "data.train.num_workers=2",
    "data.eval.num_workers=2",
    "data.expected=null",
    "duration.epochs=3",
    "schedule.warmup_epochs=1",
    f"algorithms.progressive_resizing.stages=[{{epochs: 2, image_size: 48}}, {{epochs: 1, image_size: {SIZE_PX}}}]",
    f"algorithms.fixres={{epochs: 1, image_size: {SIZE_PX}, learning_rate: 0.001}}",
    "algorithms.ema={half_life_steps: 20}",
    "precision=fp32",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the requested file after each command."""
    options = _parser().parse_args(arguments)
    report = measure(options)
    print(table(report))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every command on every run."""
    cases: list[dict[str, Any]] = []
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"cores": os.cpu_count()},
        "versions": versions(LIBRARIES),
        "classes": {"number": NUM_CLASSES, "train_images": TRAIN_IMAGES, "eval_images": EVAL_IMAGES, "px": STORED_PX},
        "cases": cases,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            for what, command in commands_of(name, Path(folder)):
                progress(f"{name}: {what}")
                load = os.getloadavg()[0]
                cpu, wall = cost_of_process(command, cwd=ROOT, said=Path(folder, "said.txt"))
                seconds = {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2), "load_before": round(load, 2)}
                cases.append({"run": name, "command": what, **seconds})
                if options.json is not None:
                    replace_file(options.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    progress("")
    return report


def commands_of(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands on one run, the training first; the first is prepared when it is asked for."""
    results = folder / "results"
    common = [f"results_dir={results}", f"run_name={name}", "logging.progress_bar=false"]
    if name == "digits":
        recipe = ["-f", "yamls/digits_medium.yaml", *common]
        pictures = [str(folder / "digits")]
        _draw_folder(folder / "digits", classes=1, images=PREDICTED_IMAGES, px=8)
    else:
        data = folder / "classes1000"
        _draw_folder(data / "train", classes=NUM_CLASSES, images=TRAIN_IMAGES, px=STORED_PX)
        _draw_folder(data / "val", classes=NUM_CLASSES, images=EVAL_IMAGES, px=STORED_PX, first=TRAIN_IMAGES)
        where = [f"data.source={{name: folder, path: {data}}}", f"data.cache_dir={folder / 'cache'}"]
        recipe = ["-f", "yamls/resnet50_medium.yaml", *common, *where, *CLASSES_1000]
        pictures = [str(data / "val" / f"class_{number:04d}") for number in range(PREDICTED_IMAGES // EVAL_IMAGES)]
    run = str(results / name)
    yield "run.py", _python("run.py", *recipe)
    yield "run.py --probe", _python("run.py", *recipe, "--probe")
    yield "run.py --find-lr", _python("run.py", *recipe, "--find-lr")
    yield "evaluate.py", _python("evaluate.py", run)
    yield f"predict.py, {PREDICTED_IMAGES} pictures", _python("predict.py", run, *pictures)
    yield "training.results.report", _python("-m", "training.results.report", run)
    for to in FORMATS:
        if to != "hf":  # which knows neither the digits' network nor BlurPool
            yield f"training.export --to {to}", _python("-m", "training.export", run, "--to", to)
    yield "demo.py --export", _python("demo.py", run, "--export", str(folder / f"space_{name}"))


def table(report: dict[str, Any]) -> str:
    """The report as text: a line a command."""
    lines = [["run", "command", "wall clock", "CPU", "within 60 s", "load before"]]
    for case in report["cases"]:
        judged = "" if case["command"] == "run.py" else "yes" if case["wall_s"] <= GOAL_SECONDS else "no"
        numbers = [f"{case['wall_s']:.1f} s", f"{case['cpu_s']:.1f} s", judged, f"{case['load_before']:.1f}"]
        lines.append([case["run"], case["command"], *numbers])
    return columns(lines)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _draw_folder(folder: Path, *, classes: int, images: int, px: int, first: int = 0) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(classes):
            (folder / f"class_{number:04d}").mkdir(parents=True)
        numbers = [(label, first + i) for label in range(classes) for i in range(images)]
        list(pool.map(lambda one: _draw(folder / f"class_{one[0]:04d}" / f"{one[1]}.jpg", *one, px=px), numbers))


def _draw(path: Path, label: int, number: int, *, px: int) -> None:
    """A grating in two colors that belong to the class, at a position and with noise that belong to the image."""
    of_class, of_image = np.random.default_rng(label), np.random.default_rng((label, number))
    angle, period = of_class.uniform(0, np.pi), of_class.uniform(4, 24)
    dark, bright = of_class.uniform(0, 255, 3), of_class.uniform(0, 255, 3)
    y, x = np.mgrid[:px, :px] + of_image.uniform(0, period, (2, 1, 1))
    wave = 0.5 + 0.5 * np.sin(2 * np.pi / period * (np.cos(angle) * x + np.sin(angle) * y))
    pixels = dark + (bright - dark) * wave[..., None] + of_image.normal(0, 12, (px, px, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commands", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("digits", "classes1000"), default=["digits", "classes1000"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
