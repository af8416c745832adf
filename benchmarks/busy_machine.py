"""How fast a small network trains on an idle machine and beside other work, by how torch's threads wait.

    python -m benchmarks.busy_machine --json figures.json      # about 6 minutes
    python -m benchmarks.busy_machine --read figures.json      # print earlier figures, measure nothing
    python -m benchmarks.busy_machine --quick                  # only checks that it runs

One process per setting trains the digits' ResNet on random images. The processes take turns of a second each, and only
one runs at a time, so that drifting clock speeds and neighbors affect all of them alike. The table reports medians over
the rounds, and each setting's ratio to libgomp's default within a round, with quartiles. Busy loops are processes that
never wait; with as many of them as cores, each thread of the training process gets about half a core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import columns, hardware, progress, spread, versions
from models.resnet import resnet_digits

ROOT = Path(__file__).parents[1]
BATCH_SIZE, IMAGE_SIZE = 64, 16
WARMUP_STEPS = 5
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
DEFAULT = "300,000 spins (libgomp)"
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {"GOMP_SPINCOUNT": "300000"},
    "100,000 spins": {"GOMP_SPINCOUNT": "100000"},
    "30,000 spins (run.py)": {"GOMP_SPINCOUNT": "30000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "no spins": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read earlier figures; print the table, and write the JSON file that was asked for."""
    options = parse(arguments)
    if options.turns:
        take_turns(options.turn_seconds)
        return
    try:
        report = json.loads(options.read.read_text()) if options.read else measure(options)
    except KeyboardInterrupt:
        print("\nstopped; nothing is written", file=sys.stderr)
        sys.exit(130)
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy_machine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns of each setting")
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, os.cpu_count() or 1], help="numbers of busy loops")
    parser.add_argument("--quick", action="store_true", help="one short round without busy loops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of a --json")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)  # a process that is measured
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.turn_seconds, options.loops = 1, 0.05, [0]
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they go into the JSON file: images/s and CPU-ms per step of every turn."""
    runs: list[dict[str, Any]] = []
    with contextlib.ExitStack() as processes:
        trainers = {
            name: processes.enter_context(trainer(environment, options.turn_seconds))
            for name, environment in SETTINGS.items()
        }
        for process in trainers.values():
            _line(process)  # that it is ready
        for loops in options.loops:
            with busy_loops(loops):
                for number in range(options.rounds):
                    progress(f"round {number + 1} of {options.rounds} beside {loops} busy loops")
                    for name, process in trainers.items():
                        print(file=process.stdin, flush=True)
                        runs.append({"setting": name, "loops": loops, "round": number, **json.loads(_line(process))})
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {**hardware(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": versions(("torch",)),
        "turn_seconds": options.turn_seconds,
        "runs": runs,
    }


@contextlib.contextmanager
def trainer(environment: dict[str, str], turn_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that trains for one turn whenever it reads a line."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--turns", "--turn-seconds", str(turn_seconds)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**inherited, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the benchmark, which ends it
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that use a core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def take_turns(turn_seconds: float) -> None:
    """Train for `turn_seconds` after each line on stdin; print the turn's figures as a line of JSON."""
    torch.manual_seed(0)
    network = resnet_digits(num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(10, (BATCH_SIZE,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    for _ in range(WARMUP_STEPS):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        step()  # wakes the threads
        started, cpu, steps = time.perf_counter(), time.process_time(), 0
        while (elapsed := time.perf_counter() - started) < turn_seconds:
            step()
            steps += 1
        cpu_ms = 1000 * (time.process_time() - cpu) / steps
        print(json.dumps({"images_per_second": steps * BATCH_SIZE / elapsed, "cpu_ms_per_step": cpu_ms}), flush=True)


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["busy loops", "threads wait for", "images/s", "of libgomp's", "quartiles", "CPU-ms per step"]]
    kinds = dict.fromkeys((one["loops"], one["setting"]) for one in report["runs"])
    for loops, setting in kinds:
        runs = _turns(report, loops, setting)
        pairs = zip(runs, _turns(report, loops, DEFAULT), strict=True)
        ratio = spread([one["images_per_second"] / other["images_per_second"] for one, other in pairs])
        lines.append(
            [
                str(loops),
                setting,
                f"{statistics.median(one['images_per_second'] for one in runs):,.0f}",
                f"{ratio['median']:.2f}",
                f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
                f"{statistics.median(one['cpu_ms_per_step'] for one in runs):.1f}",
            ]
        )
    return columns(lines)


def _turns(report: dict[str, Any], loops: int, setting: str) -> list[dict[str, Any]]:
    return [one for one in report["runs"] if (one["loops"], one["setting"]) == (loops, setting)]


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a training process ended with status {process.wait()}")
    return line


if __name__ == "__main__":
    sys.exit(main())
