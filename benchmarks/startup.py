"""The cost of run.py before it trains: a mistake, --help, a plan, the way to the first step, next to their imports.

    python -m benchmarks.startup --json figures.json                     # about 10 minutes of one core
    python -m benchmarks.startup --read figures.json                     # measure nothing
    python -m benchmarks.startup --quick --recipes digits_medium         # a minute; checks that it runs

Every case is a fresh process. A round runs each case once, in turn, and a case is compared to the `import torch` of its
own round. The cost is user and system CPU-seconds of the process and of those it waited for: other processes cannot add
to it, though they can slow memory down. Wall-clock seconds are given as well, and depend on the machine's load. A run
that is not counted writes bytecode and the digits' .beton first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import columns, cost_of_process, hardware, progress, spread, verdict, versions

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml"))
TORCH, COMPOSER, LEAN, HELP, FIRST_STEP = (
    "import torch", "import composer", "the same in run.py", "run.py --help", "first training step",
)  # fmt: skip
MISTAKES = {"wrong key": "foo=1", "wrong value": "duration.epochs=x", "wrong name": "algorithms.mixupp.alpha=1"}
GOAL_HELP, GOAL_MISTAKE, GOAL_PLAN = 0.2, 1.0, 3.0  # CPU-seconds: in all; the others beyond `import torch`
LIBRARIES = ("torch", "torchvision", "mosaicml", "torchmetrics", "transformers", "scipy", "matplotlib")

LEAN_SCRIPT = "from training.engines.lean_import import import_lean; import_lean(); import composer"
# run.py, ended after its first step, at the event where the recorder counts the step.
FIRST_STEP_SCRIPT = """
import os, sys
from training.cli import main
from training.engines.lean_import import import_lean
import_lean()
from training.results.recorder import Recorder
Recorder.batch_end = lambda self, state, logger: os._exit(0)
sys.exit(main() or 1)
"""


@dataclass(frozen=True)
class Case:
    """A process to measure, and its goal in CPU-seconds: in all, or beyond `import torch`."""

    name: str
    command: tuple[str, ...]
    status: int = 0
    goal: float | None = None
    over_torch: bool = True


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read earlier measurements; print the table, and write the requested JSON file."""
    options = parse(arguments)
    report = json.loads(options.read.read_text()) if options.read else measure(options)
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME", help="to be planned")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of a --json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything requested, as written to the JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(options.recipes, Path(folder))
        run(cases[-1], Path(folder))
        found: dict[str, dict[str, Any]] = {
            case.name: {"goal": case.goal, "over_torch": case.over_torch, "cpu_s": [], "wall_s": []} for case in cases
        }
        for number in range(options.rounds):
            for case in cases:
                progress(f"round {number + 1} of {options.rounds}: {case.name}")
                cpu, wall = run(case, Path(folder))
                found[case.name]["cpu_s"].append(round(cpu, 3))
                found[case.name]["wall_s"].append(round(wall, 3))
    progress("")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {**hardware(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": versions(LIBRARIES),
        "rounds": options.rounds,
        "cases": found,
    }


def cases_of(recipes: Sequence[str], folder: Path) -> list[Case]:
    """The cases in order; the first training step is the last. folder: for results and data."""
    python = (sys.executable, "-c")
    digits = (sys.executable, "run.py", "-f", "yamls/digits_medium.yaml")
    training = ("-f", "yamls/digits_medium.yaml", f"results_dir={folder / 'results'}", f"data.cache_dir={folder}")
    return [
        Case(TORCH, (*python, "import torch")),
        Case(COMPOSER, (*python, "import composer")),
        Case(LEAN, (*python, LEAN_SCRIPT)),
        Case(HELP, (sys.executable, "run.py", "--help"), goal=GOAL_HELP, over_torch=False),
        *(Case(name, (*digits, mistake), status=2, goal=GOAL_MISTAKE) for name, mistake in MISTAKES.items()),
        *(
            Case(f"--plan {name}", (sys.executable, "run.py", "-f", f"yamls/{name}.yaml", "--plan"), goal=GOAL_PLAN)
            for name in recipes
        ),
        Case(FIRST_STEP, (*python, FIRST_STEP_SCRIPT, *training)),
    ]


def run(case: Case, folder: Path) -> tuple[float, float]:
    """CPU-seconds and wall-clock seconds of a process. Raises RuntimeError for an unexpected exit status."""
    return cost_of_process(case.command, cwd=ROOT, said=folder / "said.txt", status=case.status)


def over_torch(report: dict[str, Any], name: str) -> list[float]:
    """CPU-seconds of a case beyond `import torch`, round by round."""
    cases = report["cases"]
    return [mine - torchs for mine, torchs in zip(cases[name]["cpu_s"], cases[TORCH]["cpu_s"], strict=True)]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["a process's", "CPU-seconds", "lowest, highest", "over import torch", "wall clock", "goal", ""]]
    for name, case in report["cases"].items():
        cpu, more = spread(case["cpu_s"]), spread(over_torch(report, name))
        goal, judged = case["goal"], more if case["over_torch"] else cpu
        lines.append(
            [
                name,
                f"{cpu['median']:.2f}",
                f"{cpu['min']:.2f}, {cpu['max']:.2f}",
                f"{more['median']:+.2f}",
                f"{statistics.median(case['wall_s']):.2f}",
                "" if goal is None else f"at most {goal:g} {'more' if case['over_torch'] else 'in all'}",
                "" if goal is None else verdict(judged, goal),
            ]
        )
    cases = report["cases"]
    steps, imports = (statistics.median(cases[name]["cpu_s"]) for name in (FIRST_STEP, COMPOSER))
    return (
        f"{columns(lines)}\n\nthe first training step is done after {steps:.2f} CPU-seconds, "
        f"{abs(steps - imports):.2f} {'after' if steps > imports else 'before'} a plain import of Composer"
    )


if __name__ == "__main__":
    sys.exit(main())
