"""Checks this project on a GPU: what the machine is, the tests that need one, benchmarks, a recipe's phases in small.

    scripts/gpu_check.sh                              # results/gpu/gpu_check.json and gpu_check.txt
    OUT=/tmp/report KIT=/tmp/.gpu scripts/gpu_check.sh
    scripts/gpu_check.sh --parts environment,recipe   # some of the parts

Run it in a checkout that holds the folder .gpu/ of scripts/gpu_kit.sh, with a python3 that has torch. It needs no
network and installs nothing. Every part runs in processes of its own with a time limit of its own, and a failure is a
row of the report. Without a GPU everything runs on the CPU in small, and what needs a GPU is skipped with the reason.
docs/gpu_check.md describes the report.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine.benchmark_rows import ITEM, arguments, benchmark_rows
from benchmarks.gpu_machine.environment import NEEDED
from benchmarks.gpu_machine.outcomes import VARIABLE
from benchmarks.gpu_machine.processes import Ended, run
from benchmarks.gpu_machine.report import PARTS, Row, exit_status, make_report, problems, table, write_report

ROOT = Path(__file__).parents[2]
RECIPE = "yamls/resnet50_medium.yaml"
# Seconds per part; the recipe's are for each precision. Together with the installation they stay below 8 minutes.
LIMITS = {"environment": 40.0, "tests": 215.0, "benchmark": 65.0, "recipe": 70.0}
ALL_SECONDS = 460.0
RECIPE_SECONDS_ON_CPU = 180.0
STOPPED = "stopped before it began"


@dataclass
class Check:
    """What the parts share. deadline: of the whole check, on time.monotonic()'s clock."""

    kit: Path
    scratch: Path
    deadline: float
    device: str = "cpu"
    environment: dict[str, Any] = field(default_factory=dict)

    def limit(self, part: str) -> float:
        """Seconds that a process of `part` may take now."""
        own = RECIPE_SECONDS_ON_CPU if (part, self.device) == ("recipe", "cpu") else LIMITS[part]
        return max(1.0, min(own, self.deadline - time.monotonic()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check, write its report and print the table; returns the exit status."""
    options = _parser().parse_args(arguments)
    chosen = options.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        return _complain(f"--parts {options.parts}: no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not (options.kit / "kit.json").is_file():
        return _complain(f"--kit {options.kit}: no kit there; scripts/gpu_kit.sh makes one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # writes what there is, as Ctrl-C does
    started, began = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as scratch:
        check = Check(options.kit, Path(scratch), began + ALL_SECONDS)
        # The environment always: the other parts ask it for the device.
        rows, stopped = collect([(part, _PARTS[part]) for part in PARTS if part in ("environment", *chosen)], check)
    report = make_report(
        rows,
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        commit=_commit(),
        device=check.device,
        environment=check.environment,
        stopped=stopped,
    )
    wrong = problems(report)
    assert not wrong, wrong
    try:
        paths = write_report(report, options.out)
    except OSError as error:
        print(table(report))
        return _complain(f"--out {options.out} cannot be written ({error.strerror}); give another folder")
    print(f"\n{table(report)}\n{paths[0]}\n{paths[1]}")
    return exit_status(report)


def collect(parts: Sequence[tuple[str, Callable[[Check], Iterator[Row]]]], check: Check) -> tuple[list[Row], bool]:
    """The rows of all parts, and whether Ctrl-C ended them. A part that raises is a failed row; the next one runs."""
    rows: list[Row] = []
    stopped = False
    for name, part in parts:
        if stopped:
            rows.append(Row(name, name, "skipped", note=STOPPED))
            continue
        begun, before = time.monotonic(), len(rows)
        print(f"[gpu check] {name}", flush=True)
        try:
            for row in part(check):
                rows.append(row)
                _tell(row)
        except KeyboardInterrupt:
            stopped = True
            rows.append(Row(name, name, "failed", _since(begun), "stopped by Ctrl-C or SIGTERM"))
        except Exception as error:  # whatever it is, the others shall run
            rows.append(Row(name, name, "failed", _since(begun), f"the check itself failed: {error!r}"))
        if len(rows) == before:
            rows.append(Row(name, name, "failed", _since(begun), "the check found nothing to do"))
    return rows, stopped


# --- the parts -----------------------------------------------------------------------------------------------------


def check_environment(check: Check) -> Iterator[Row]:
    """What this machine is. Sets the device that the other parts use."""
    ended = run([sys.executable, "-m", "benchmarks.gpu_machine.environment"], limit_seconds=check.limit("environment"))
    found = _last_json(ended)
    if found is None:
        yield _failed("environment", "machine", ended)
        return
    check.environment = found
    check.device = "cuda" if found["gpus"] else "cpu"
    gpus = ", ".join(gpu["name"] for gpu in found["gpus"]) or "no CUDA device"
    note = f"driver {found['driver']}, CUDA {found['cuda']}, torch {found['torch']}, Python {found['python']}"
    yield Row("environment", gpus, "passed", ended.seconds, f"{note}, {found['cores']} cores")
    missing = [name for name in NEEDED if found["packages"][name] is None]
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    yield Row("environment", "packages", "failed" if missing else "passed", note=_missing(missing) or versions)
    native = found["decoder"] == "native"
    yield Row("environment", "decoder", "passed" if native else "failed", note=found["decoder"])
    yield _kit_fits(check)


def check_tests(check: Check) -> Iterator[Row]:
    """The tests marked `gpu`, a row each. A test that ends pytest itself is a failure, and the rest runs anew."""
    chosen = ["tests/gpu"]
    deadline = time.monotonic() + check.limit("tests")
    while chosen:
        lines = check.scratch / "outcomes"
        lines.write_text("")
        command = [sys.executable, "-m", "pytest", *chosen, "-m", "gpu", "-p", "benchmarks.gpu_machine.outcomes"]
        command += ["-p", "no:cacheprovider", "--color=no", "--continue-on-collection-errors"]
        # tests/conftest.py has torch's compiler work in the process itself, which is slow for a GPU's many kernels.
        environment = {VARIABLE: str(lines), "TORCHINDUCTOR_COMPILE_THREADS": str(min(8, os.cpu_count() or 1))}
        limit = max(1.0, deadline - time.monotonic())
        ended = run(command, limit_seconds=limit, environment=environment)
        rows, chosen = test_rows([json.loads(line) for line in lines.read_text().splitlines()], ended)
        yield from rows or [_failed("tests", "pytest", ended)]


def check_benchmark(check: Check) -> Iterator[Row]:
    """`python -m benchmarks.gpu`, as much of it as the time allows; in small on a CPU."""
    limit, written = check.limit("benchmark"), check.scratch / "benchmark.json"
    command = [sys.executable, "-m", ITEM, *arguments(check.device, limit_seconds=limit), "--json", str(written)]
    ended = run(command, limit_seconds=limit)
    if written.is_file():  # with what there is, if it was stopped at its limit
        yield from benchmark_rows(json.loads(written.read_text()))
    if ended.status or not written.is_file():
        yield _failed("benchmark", ITEM, ended)
    else:
        yield Row("benchmark", ITEM, "passed", ended.seconds, "as much as fits into its time")


def check_recipe(check: Check) -> Iterator[Row]:
    """The phases of `RECIPE` in small, once in each precision that the device has."""
    from benchmarks.gpu_machine.kit import repeat_entries

    on_gpu = check.device == "cuda"
    for split in ("train", "val"):
        times = 48 if on_gpu and split == "train" else 1
        repeat_entries(check.kit / "photos" / f"{split}.beton", check.scratch / f"{split}.beton", times=times)
    for precision in ("amp_fp16", "amp_bf16"):
        if on_gpu:
            yield from _recipe_rows(check, precision)
        else:
            yield Row("recipe", precision, "skipped", note="not possible on the CPU: Composer does it on GPUs alone")
    if not on_gpu:
        yield from _recipe_rows(check, "fp32")


_PARTS: dict[str, Callable[[Check], Iterator[Row]]] = {
    "environment": check_environment,
    "tests": check_tests,
    "benchmark": check_benchmark,
    "recipe": check_recipe,
}


def test_rows(lines: Sequence[dict[str, Any]], ended: Ended) -> tuple[list[Row], list[str]]:
    """A row for each test of the plugin's lines, and the tests that are still to be run.

    Without an outcome are the test that pytest did not survive, and those after it; all fail if the time is up.
    """
    outcomes = {line["test"]: line for line in lines}  # the last line of a test: its outcome, if it has one
    open_ones = [name for name, line in outcomes.items() if line["outcome"] == "selected"]
    rows = [_test_row(name, line) for name, line in outcomes.items() if line["outcome"] != "selected"]
    failed, rest = (open_ones, []) if ended.timed_out else (open_ones[:1], open_ones[1:])
    for name in failed:
        rows.append(
            Row("tests", _item(name), "failed", note=f"no outcome: pytest {ended.told}", error=ended.lines[-3:])
        )
    return rows, rest


def _test_row(name: str, line: dict[str, Any]) -> Row:
    reason = line["reason"].strip().splitlines()
    seconds = round(line["seconds"], 2)
    if line["outcome"] == "failed":
        return Row("tests", _item(name), "failed", seconds, _error_line(reason), reason[-_ERROR_LINES:])
    return Row("tests", _item(name), line["outcome"], seconds, " ".join(reason))


def _item(name: str) -> str:
    """The test without what all of their names share; the file alone for one that cannot be imported."""
    file, _, test = name.removeprefix("tests/gpu/test_").partition("::")
    file = file.removesuffix(".py").removesuffix("_on_gpu")
    return f"{file}: {test.removeprefix('test_')}" if test else file


def overrides(device: str, *, train: Path, val: Path, num_train: int, scratch: Path, cores: int) -> list[str]:
    """The keys that make `RECIPE` small: all of its phases, on photos from .beton files."""
    sizes, batches, epochs = ((128, 224, 288), (512, 320, 256), 2) if device == "cuda" else ((32, 48, 64), (16,) * 3, 1)
    stages = ",".join(
        f"{{epochs: {epochs}, image_size: {size}, per_device_batch_size: {batch}}}"
        for size, batch in zip(sizes, batches, strict=True)
    )
    workers = max(1, min(16, cores))
    return [
        f"device={'gpu' if device == 'cuda' else 'cpu'}",
        "data.source=synthetic",  # the number of images and the classes, which the plan asks of a source
        f"data.source.num_samples={num_train}",
        "data.source.num_classes=10",
        "data.expected=null",
        f"data.train.path={train}",
        f"data.train.per_device_batch_size={batches[0]}",
        f"data.train.num_workers={workers}",
        f"data.eval.path={val}",
        f"data.eval.image_size={sizes[-1]}",
        "data.eval.per_device_batch_size=16",
        f"data.eval.every_epochs={3 * epochs}",
        f"data.eval.num_workers={workers}",
        f"algorithms.progressive_resizing.stages=[{stages}]",
        "optimizer.learning_rate_per_256_images=0.05",  # a few steps of warm-up bear no more
        # The recipe's rate per image: its 8 devices have 2,048 images at 4e-3.
        f"algorithms.fixres={{epochs: {epochs}, image_size: {sizes[-1]}, learning_rate: {2e-6 * batches[-1]:.2e}}}",
        f"schedule.warmup_epochs={epochs / 2}",
        f"duration.epochs={3 * epochs}",
        f"checkpoints={{every_epochs: {3 * epochs}, keep_best: false}}",
        "logging.progress_bar=false",
        f"results_dir={scratch}",
    ]


def _recipe_rows(check: Check, precision: str) -> Iterator[Row]:
    from data.beton.format import Beton
    from training.results.history import read_metrics

    train, figures = check.scratch / "train.beton", check.scratch / f"{precision}.json"
    given = overrides(
        check.device, train=train, val=check.scratch / "val.beton", num_train=len(Beton(train)),
        scratch=check.scratch / precision, cores=check.environment.get("cores") or os.cpu_count() or 1,
    )  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.gpu_machine.recipe_run", str(figures), "-f", RECIPE]
    ended = run([*command, f"precision={precision}", *given], limit_seconds=check.limit("recipe"))
    if ended.status or not figures.is_file():
        yield _failed("recipe", precision, ended)
        return
    measured = json.loads(figures.read_text())
    for phase in measured["phases"]:
        item = f"{precision} {phase['image_size']} px, batch {phase['batch_size']}"
        seconds = phase["train_seconds"]
        yield Row("recipe", item, "passed", seconds, _phase_note(phase), figures={"precision": precision, **phase})
    last = read_metrics(check.scratch / precision / "resnet50_medium" / "metrics.csv")[-1]
    status = "passed" if math.isfinite(last["train_loss"]) and math.isfinite(last["eval_loss"]) else "failed"
    note = f"{measured['until_first_step_seconds']:.1f} s until the first step, training loss {last['train_loss']:.3f}"
    whole = {"precision": precision, **{key: last[key] for key in ("train_loss", "eval_loss", "eval_top1")}}
    yield Row("recipe", f"{precision} in all", status, ended.seconds, note, figures=whole)


def _phase_note(phase: dict[str, Any]) -> str:
    peak = "" if phase["peak_memory_gb"] is None else f", peak {phase['peak_memory_gb']:.1f} GB"
    warm = ", with the first steps" if phase["with_first_epoch"] else ""
    rate, share = phase["images_per_second"], phase["loader_share"]
    return f"{rate:,.0f} images/s, loader {share:.1%} of the time{peak}, {phase['steps']} steps{warm}"


def _kit_fits(check: Check) -> Row:
    """Whether the kit was made for this machine's Python and torch."""
    made = json.loads((check.kit / "kit.json").read_text())
    found = {name: ".".join(check.environment[name].split(".")[:2]) for name in ("python", "torch")}
    wrong = [f"{name} {made[name]}, and {found[name]} is here" for name in found if made[name] != found[name]]
    if wrong:
        return Row("environment", "kit", "failed", note=f"it was made for {'; '.join(wrong)}")
    return Row("environment", "kit", "passed", note=f"{len(made['wheels'])} wheels for Python {made['python']}")


# --- helpers -------------------------------------------------------------------------------------------------------

_ERROR_LINES = 12


def _failed(part: str, item: str, ended: Ended) -> Row:
    return Row(
        part, item, "failed", ended.seconds, f"{ended.told}: {_error_line(ended.lines)}", ended.lines[-_ERROR_LINES:]
    )


def _error_line(lines: Sequence[str]) -> str:
    """The line that says most: pytest marks errors with an E, everything else ends with them."""
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return next(iter(marked), "") or next((line.strip() for line in reversed(lines) if line.strip()), "")


def _missing(names: Sequence[str]) -> str:
    return f"not installed: {', '.join(names)}; scripts/gpu_kit.sh takes them for present" if names else ""


def _last_json(ended: Ended) -> dict[str, Any] | None:
    if ended.status == 0:
        for line in reversed(ended.lines):
            if line.startswith("{"):
                return json.loads(line)
    return None


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _tell(row: Row) -> None:
    seconds = "" if row.seconds is None else f" in {row.seconds:.1f} s"
    print(f"[gpu check] {row.part}: {row.item}: {row.status}{seconds}", flush=True)


def _complain(text: str) -> int:
    print(f"gpu_check: {text}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 all passed or were skipped with a reason, 1 something failed, 2 a mistake in the call, "
        "130 stopped. In all but a mistake the report is written.",
    )
    out = Path(os.environ.get("OUT") or ROOT / "results" / "gpu")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help="default: $OUT, or results/gpu")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"default: {','.join(PARTS)}")
    return parser


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
