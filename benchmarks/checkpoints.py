"""How long a checkpoint stops training: as Composer writes it, at once, or by a thread from a copy in memory.

    python -m benchmarks.checkpoints --json figures.json     # a minute of two quiet cores

A network with SGD's momentum buffers is saved again and again, in each way in turn. `stopped` is how long training
waits, `written` until the file has its name on disk, `checked` the reading and comparing of every byte before resuming.
Composer's way gathers and writes the state with Composer's functions, and then flushes the file to disk, as the others
do. Goal: `stopped` of the thread at most a tenth of that of Composer's way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import checkpoint, reproducibility
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from benchmarks.measuring import columns, hardware, progress, spread, versions
from data.whole_files import replace_file
from models.classifier import ImageClassifier
from training.checkpoints.names import LATEST, sync
from training.checkpoints.reading import check_checkpoint
from training.checkpoints.saving import Checkpoints

GOAL = 0.1
COMPOSER, AT_ONCE, THREAD = "Composer's way", "at once", "by a thread"
_WAYS: dict[str, dict[str, bool]] = {
    COMPOSER: {},
    AT_ONCE: {"asynchronous": False},
    THREAD: {"asynchronous": True},
    "shards, at once": {"asynchronous": False, "sharded": True},
    "shards, by a thread": {"asynchronous": True, "sharded": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the requested file."""
    options = _parser().parse_args(arguments)
    report = measure(options)
    print(table(report))
    if options.json is not None:
        replace_file(options.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every save of every round, in seconds."""
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = _trained_for_a_step(options.model)
        state, logger = trainer.state, trainer.logger
        callbacks = {
            name: Checkpoints(Path(folder) / name, keep_best=False, **settings)  # pyright: ignore[reportArgumentType]
            for name, settings in _WAYS.items()
        }
        for number in range(options.rounds + 1):
            for name in _WAYS:
                progress(f"round {number} of {options.rounds}: {name}")
                if not number:
                    callbacks[name].init(state, logger)
                seconds = _one_save(callbacks[name], state, by_composer=name == COMPOSER)
                seconds["checked"] = _timed(lambda name=name: check_checkpoint(Path(folder) / name / LATEST))
                for what, value in seconds.items() if number else ():  # the first round warms up
                    figures.setdefault(f"{what}, {name}", []).append(round(value, 4))
        size = (Path(folder) / THREAD / LATEST).stat().st_size
        trainer.close()
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"cores": os.cpu_count()},
        "versions": versions(("torch", "torchvision", "mosaicml")),
        "model": options.model,
        "megabytes": round(size / 1e6, 1),
        "seconds": figures,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["seconds", "median", "lowest, highest"]]
    for name, values in report["seconds"].items():
        one = spread(values)
        lines.append([name, f"{one['median']:.3f}", f"{one['min']:.3f}, {one['max']:.3f}"])
    shards = _share(report, "shards, by a thread", "shards, at once")
    return (
        f"{report['model']}, {report['megabytes']} MB\n{columns(lines)}\n\nthe thread stops training for "
        f"{_share(report, THREAD, COMPOSER)} of the time of {COMPOSER}; goal: at most {GOAL}\n"
        f"of {AT_ONCE}: {_share(report, THREAD, AT_ONCE)}; shards: {shards}"
    )


def _share(report: dict[str, Any], way: str, other: str) -> str:
    pairs = zip(report["seconds"][f"stopped, {way}"], report["seconds"][f"stopped, {other}"], strict=True)
    ratio = spread([thread / once for thread, once in pairs])
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def _one_save(callback: Checkpoints, state: Any, *, by_composer: bool) -> dict[str, float]:
    started = time.perf_counter()
    if by_composer:
        whole = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        beside = callback._folder / "beside"
        checkpoint._write_checkpoint_file(whole, str(beside))
        sync(beside)
        beside.replace(callback._folder / LATEST)
    else:
        callback._save(state)
    stopped = time.perf_counter() - started
    callback._background.wait()
    return {"stopped": stopped, "written": time.perf_counter() - started}


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _trained_for_a_step(name: str) -> Trainer:
    model = ImageClassifier(get_model(name, num_classes=1000), num_classes=1000)
    data = TensorDataset(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=2),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        max_duration="1ba",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    return trainer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="resnet50", help="of torchvision (resnet50)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument(
        "--folder", metavar="DIR", help="on the disk to measure; default: the system's temporary folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
