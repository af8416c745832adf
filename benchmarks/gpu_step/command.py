"""The command line of benchmarks.gpu."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step.machine import measure_machine
from benchmarks.gpu_step.plan import SCALES, Group, chosen, plan
from benchmarks.gpu_step.profiling import profile_step
from benchmarks.gpu_step.report import images_per_second, make_report, text
from benchmarks.gpu_step.running import FAILED, Budget, Result, Runner, one_line
from benchmarks.measuring import hardware, progress, versions
from data.whole_files import replace_file

LIBRARIES = ("torch", "torchvision", "triton", "mosaicml", "timm", "antialiased_cnns", "pytorch_optimizer")
_MINUTES = {"cuda": 12.0, "cpu": 30.0}
_QUICK_MINUTES = 0.75
_PEAK_SECONDS, _PEAK_SHARE = 0.4, 1 / 600  # for each of some nine sizes
PICTURES = (".svg", ".png", ".pdf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the report, write the requested files; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scale = SCALES[f"quick {device.type}" if options.quick else device.type]
    groups = chosen(plan(scale), options.only)
    # Inductor's C++ compiler takes a minute on a busy machine.
    options.backend = options.backend or ("aot_eager" if options.quick and device.type == "cpu" else "inductor")
    wrong = _mistake(options, device, groups)
    if wrong:
        print(f"gpu: {wrong}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(dict.fromkeys(case.name for group in groups for case in group.cases)))
        return 0
    logging.getLogger("torch").setLevel(logging.ERROR)  # graph breaks are counted, and told in the JSON file
    session = Session(options, device, compile_seconds=scale.compile_seconds)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # writes what there is, as Ctrl-C does
    try:
        session.measure(groups)
    except KeyboardInterrupt:
        session.stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
        progress("")
    return session.finish()


class Session:
    """One run of the benchmark: what is measured so far, and where it goes."""

    def __init__(self, options: argparse.Namespace, device: torch.device, *, compile_seconds: float) -> None:
        self.options, self.device = options, device
        if device.type == "cpu":
            torch.set_num_threads(options.threads)
        # For the whole process, in which torch keeps the first choice that it made for a shape.
        torch.backends.cudnn.benchmark = options.cudnn_benchmark
        minutes = options.minutes or (_QUICK_MINUTES if options.quick else _MINUTES[device.type])
        self.runner = Runner(
            device,
            Budget(minutes * 60),
            progress,
            backend=options.backend,
            compile_seconds=compile_seconds,
            rounds=options.rounds,
        )
        self.machine: dict[str, Any] | None = None
        self.profile: dict[str, Any] | None = None
        self.stopped = False
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "figure", "list")}
        self.about = {
            "date": time.strftime("%Y-%m-%d"),
            "settings": {**settings, "minutes": minutes, "device": device.type},
            "hardware": hardware(device),
            "versions": versions(LIBRARIES),
        }

    def measure(self, groups: Sequence[Group]) -> None:
        """The machine, then every group, and the profile of the first one's fastest step."""
        progress("the machine's peaks")
        precisions = list(dict.fromkeys(case.precision for group in groups for case in group.cases))
        seconds = min(_PEAK_SECONDS, self.runner.budget.seconds * _PEAK_SHARE)
        self.machine = measure_machine(self.device, precisions, seconds=seconds)
        self.runner.run(groups, after_group=self._after_group)

    def report(self) -> dict[str, Any]:
        """Of what there is so far."""
        return make_report(
            self.runner.results,
            titles=self.runner.titles,
            about=self.about,
            machine=self.machine,
            profile=self.profile,
            seconds=self.runner.budget.used,
            stopped=self.stopped,
        )

    def finish(self) -> int:
        """Print the report and write its files; returns the exit status."""
        report = self.report()
        print(text(report))
        for path, write in ((self.options.json, _write_json), (self.options.figure, _write_figure)):
            if path is not None and not write(report, path):
                return 2
        failed = any(result.status == FAILED and result.case.plain for group in self.runner.results for result in group)
        return 130 if self.stopped else int(failed)

    def _after_group(self, index: int) -> None:
        results = self.runner.results[index]
        fastest = max((one for one in results if one.step_ms), key=images_per_second, default=None)
        if self.profile is None and fastest is not None:
            self.profile = self._profiled(fastest)
        if self.options.json is not None and any(one.step_ms for one in results):  # a machine may be taken away
            _write_json({**self.report(), "stopped": True}, self.options.json)

    def _profiled(self, result: Result) -> dict[str, Any]:
        step = self.runner.step(result.case)
        assert step is not None
        progress(f"profile of {result.case.name}")
        try:
            return {"name": result.case.name, **profile_step(step, self.device)}
        except Exception as error:  # the profiler may lack its rights, or memory
            return {"name": result.case.name, "error": one_line(error)}


def _write_json(report: dict[str, Any], path: Path) -> bool:
    try:
        replace_file(path, lambda file: file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode()))
    except OSError as error:
        print(f"gpu: --json {path} cannot be written ({error.strerror}); give another file", file=sys.stderr)
        return False
    return True


def _write_figure(report: dict[str, Any], path: Path) -> bool:
    from benchmarks.gpu_step.figure import draw

    try:
        draw(report, path)
    except ModuleNotFoundError:
        print("gpu: no picture, since matplotlib is not installed", file=sys.stderr)
    except OSError as error:
        print(f"gpu: --figure {path} cannot be written ({error.strerror}); give another file", file=sys.stderr)
        return False
    return True


# --- the command line ------------------------------------------------------------------------------------------------


def _mistake(options: argparse.Namespace, device: torch.device, groups: Sequence[Group]) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here; leave it out to measure the CPU"
    for name in ("minutes", "rounds", "threads"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            return f"--{name} {value} must be above 0"
    if not groups:
        return f"--only {options.only}: no variant has that in its name; --list shows them all"
    if options.figure is not None and options.figure.suffix not in PICTURES:
        return f"--figure {options.figure}: the file's name must end in {', '.join(PICTURES)}"
    for name in ("json", "figure"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not _can_hold(path.parent)):
            return f"--{name} {path}: no file can be written there; give another one"
    return None


def _can_hold(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that there is."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Training steps of ResNet-50 and ViT-B/16 on a GPU, the most important first, in a given time.",
        epilog="Exit status: 0 measured, 1 one of this project's own steps failed, 2 a mistake in the call, 130 "
        "stopped by Ctrl-C or SIGTERM; what was measured until then is printed and written.",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="at most; 12 on a GPU, 30 on a CPU")
    parser.add_argument("--quick", action="store_true", help="small networks within a minute, to see that it works")
    parser.add_argument("--only", metavar="PATTERN", help="variants with this in their name (* and ? as in a shell)")
    parser.add_argument("--list", action="store_true", help="print the variants' names and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well, after each group")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a picture (.svg, .png, .pdf); needs matplotlib")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each variant; otherwise 7 to 15")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch on a CPU (default: 1)")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN choose by measuring; recipes do not")
    parser.add_argument(
        "--backend", metavar="NAME", help="of torch.compile: inductor, or aot_eager in --quick on a CPU"
    )
    return parser
