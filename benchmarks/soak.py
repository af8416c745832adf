"""Whether anything grows in a long run: memory, threads, open files, the time of a step; and over many early stops.

    python -m benchmarks.soak --json figures.json     # some 5 minutes of two quiet cores
    python -m benchmarks.soak --epochs 20 --stops 10  # a minute; checks that it works

A run of 300 short epochs with all of the demo's algorithms and four image sizes is sampled at the end of every epoch;
then each loader is started 200 times and left after a batch. A slope is that of the line of least squares over the last
quarter, which has one image size and full caches. Exit status 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from benchmarks.measuring import columns, hardware, progress, versions
from data import build_loader
from data.whole_files import replace_file
from training import session
from training.engines import composer as engine
from training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
# Of one epoch, or one start of a loader. A leak of 1 MB an epoch breaks the first.
BOUNDS = {"memory_mb": 0.25, "threads": 0.01, "open_files": 0.01}
STEP_TIME_GROWTH = 0.2  # within the last quarter, of its second half's median over its first's
FIXRES_EPOCHS = 2  # of them steps are cheaper


@dataclass
class Sample:
    """The process at one moment. step_seconds: the mean of the epoch's steps."""

    memory_mb: float
    threads: int
    open_files: int
    step_seconds: float = 0.0


class Sampler(Callback):
    """A sample at the end of every epoch."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._steps: list[float] = []
        self._began = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        self._began = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._steps.append(time.perf_counter() - self._began)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.samples.append(sample(float(np.mean(self._steps))))
        self._steps = []
        progress(f"epoch {len(self.samples)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the requested file; 1 if something grows."""
    options = _parser().parse_args(arguments)
    report = measure(options)
    print(table(report))
    if options.json is not None:
        replace_file(options.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    return 0 if all(one["holds"] for one in report["slopes"]) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Samples of the run and of the loaders, and the slopes of both."""
    torch.set_num_threads(1)
    found: dict[str, list[Sample]] = {}
    with tempfile.TemporaryDirectory() as folder:
        found["training"] = _train(Path(folder), epochs=options.epochs)
        for name in ("ffcv", "torch"):
            found[f"loader {name}"] = _stops(name, Path(folder), times=options.stops)
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"cores": os.cpu_count()},
        "versions": versions(("torch", "mosaicml", "numpy")),
        "slopes": [one for what, samples in found.items() for one in slopes(what, samples)],
        "samples": {what: [asdict(one) for one in samples] for what, samples in found.items()},
    }


def slopes(what: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The growth of each figure over the last quarter, per sample, and whether it is within its bound."""
    quarter = samples[-(len(samples) // 4) :]
    made = []
    for name, bound in BOUNDS.items():
        slope = float(np.polyfit(range(len(quarter)), [getattr(one, name) for one in quarter], 1)[0])
        made.append({"what": what, "figure": name, "slope": slope, "bound": bound, "holds": slope <= bound})
    if any(one.step_seconds for one in samples):
        steps = [one.step_seconds for one in quarter[:-FIXRES_EPOCHS]]
        medians = [float(np.median(part)) for part in (steps[: len(steps) // 2], steps[len(steps) // 2 :])]
        growth = medians[1] / medians[0] - 1
        bound = STEP_TIME_GROWTH
        made.append({"what": what, "figure": "step time", "slope": growth, "bound": bound, "holds": growth <= bound})
    return made


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["of", "figure", "growth", "bound", ""]]
    for one in report["slopes"]:
        per = "of the first half's" if one["figure"] == "step time" else "a sample"
        holds = "holds" if one["holds"] else "BROKEN"
        lines.append([one["what"], one["figure"], f"{one['slope']:+.4f} {per}", f"{one['bound']:g}", holds])
    counts = ", ".join(f"{what}: {len(samples)} samples" for what, samples in report["samples"].items())
    return f"{columns(lines)}\n\n{counts}"


def sample(step_seconds: float = 0.0) -> Sample:
    """This process now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmRSS"].split()[0]) / 1024
    return Sample(memory, int(status["Threads"]), len(os.listdir("/proc/self/fd")), step_seconds)


def _train(folder: Path, *, epochs: int) -> list[Sample]:
    share = epochs // 4
    sizes = [(share, 8), (share, 12), (share, 16), (epochs - 3 * share, 20)]
    stages = ",".join(f"{{epochs: {count}, image_size: {size}}}" for count, size in sizes)
    recipe = load_recipe(
        ROOT / "yamls" / "digits_medium.yaml",
        [
            f"duration.epochs={epochs}", f"algorithms.progressive_resizing.stages=[{stages}]",
            f"algorithms.fixres={{epochs: {FIXRES_EPOCHS}, image_size: 20, learning_rate: 0.001}}",
            "algorithms.ema={half_life_steps: 50}",
            "data.source={name: synthetic, num_samples: 256, num_classes: 10, image_size: 20}",
            f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}", "logging.progress_bar=false",
        ],
    )  # fmt: skip
    sampler, build = Sampler(), engine.build_callbacks
    engine.build_callbacks = lambda *given, **named: [*build(*given, **named), sampler]
    try:
        session.train(recipe, say=lambda text: None)
    finally:
        engine.build_callbacks = build
    return sampler.samples


def _stops(loader: str, folder: Path, *, times: int) -> list[Sample]:
    made = build_loader(
        source="synthetic", source_settings={"num_samples": 256, "num_classes": 10, "image_size": 32}, split="train",
        loader=loader, per_device_batch_size=16, image_size=24, num_workers=2, cache_dir=folder / "cache",
        log=lambda text: None,
    )  # fmt: skip
    samples, stop = [], _first_of(made)
    for number in range(times):
        stop()
        samples.append(sample())
        progress(f"{loader}: stop {number + 1} of {times}")
    return samples


def _first_of(loader: Any) -> Callable[[], Any]:
    return lambda: next(iter(loader))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=300, metavar="N", help="of the run (300)")
    parser.add_argument("--stops", type=int, default=200, metavar="N", help="early stops of each loader (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
