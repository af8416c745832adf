"""Training a small network on a machine with nothing else to do, and on one with other work, by how threads wait.

    python -m benchmarks.busy_machine --json figures.json      # about 10 minutes
    python -m benchmarks.busy_machine --read figures.json      # measure nothing
    python -m benchmarks.busy_machine --quick                  # that it runs, no more

Each run is `run.py` on the digits, in a process of its own, with an environment that says how torch's threads wait for
each other. A round runs every environment once on the machine as it is, and once beside a busy loop for each core.
Compared are the images a second that a run itself counts, imports left out, and the CPU-seconds of the whole process.
"Otherwise busy" is the share of the cores' time that other processes took meanwhile, busy loops among them: it tells
whether a run with no busy loop beside it had the machine to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import columns, hardware, progress, versions

ROOT = Path(__file__).parents[1]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "run.py's": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},  # what it does where the environment is silent
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
RECIPE = (
    "yamls/digits_medium.yaml", "schedule.warmup_epochs=0", "algorithms.progressive_resizing=null",
    "algorithms.fixres=null", "logging.progress_bar=false", "device=cpu",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read what was measured before; print the table, and write the JSON file that was asked for."""
    options = parse(arguments)
    report = json.loads(options.read.read_text()) if options.read else measure(options)
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy_machine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--epochs", type=int, default=6, help="of a run; 22 steps each")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, os.cpu_count() or 1], help="busy loops beside it")
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one epoch, one round, no busy loops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of a --json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.epochs, options.loops = 1, 1, [0]
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as it goes into the JSON file."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), epochs=1, environment={"OMP_NUM_THREADS": "1"})  # converts the data
        for number in range(options.rounds):
            for loops in options.loops:
                with busy_loops(loops):
                    for name in options.only:
                        progress(f"round {number + 1} of {options.rounds}: {name} beside {loops} busy loops")
                        done = train(Path(folder), epochs=options.epochs, environment=ENVIRONMENTS[name])
                        runs.append({"environment": name, "loops": loops, **done})
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {**hardware(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": versions(("torch", "mosaicml")),
        "epochs": options.epochs,
        "runs": runs,
    }


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but work."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def train(folder: Path, *, epochs: int, environment: dict[str, str]) -> dict[str, float]:
    """Train the digits in a process; what it counted and what it cost."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    given = (*RECIPE, f"duration.epochs={epochs}", f"results_dir={folder / 'results'}", f"data.cache_dir={folder}")
    with (folder / "said.txt").open("w+") as said:
        started, busy = time.monotonic(), _busy_seconds()
        process = subprocess.Popen(
            [sys.executable, "run.py", "-f", *given],
            cwd=ROOT, env={**inherited, **environment, "PYTHONPATH": str(ROOT)}, stdout=said, stderr=said,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        wall, busy = time.monotonic() - started, _busy_seconds() - busy
        process.returncode = os.waitstatus_to_exitcode(status)  # which Popen would wait for in vain
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"run.py ended with status {process.returncode}: {said.read()}")
    cpu = usage.ru_utime + usage.ru_stime
    summary = json.loads((folder / "results" / "digits_medium" / "summary.json").read_text())
    return {
        "images_per_second": round(summary["images_per_second"], 1),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "otherwise_busy": round(max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1)), 3),
    }


def _busy_seconds() -> float:
    """Seconds of work of all cores since the machine started; 0 where the system does not tell."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:8]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, first)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def table(report: dict[str, Any]) -> str:
    """The report for people: medians, and every run's images a second."""
    lines = [["busy loops", "threads wait as", "images/s", "of each run", "CPU-seconds", "otherwise busy"]]
    kinds = list(dict.fromkeys((one["loops"], one["environment"]) for one in report["runs"]))
    for loops, environment in sorted(kinds, key=lambda kind: kind[0]):
        runs = [one for one in report["runs"] if (one["loops"], one["environment"]) == (loops, environment)]
        speeds = [one["images_per_second"] for one in runs]
        lines.append(
            [
                str(loops),
                environment,
                f"{statistics.median(speeds):,.0f}",
                " ".join(f"{speed:,.0f}" for speed in speeds),
                f"{statistics.median(one['cpu_s'] for one in runs):.1f}",
                " ".join(f"{one['otherwise_busy']:.0%}" for one in runs),
            ]
        )
    return columns(lines)


if __name__ == "__main__":
    sys.exit(main())
