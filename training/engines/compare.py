"""Measures each engine's time, memory and communication for one recipe, next to what the formulas predict.

    python -m training.engines.compare -f yamls/vit_cifar100_deepspeed.yaml --ranks 8

Each engine trains a few steps in processes of its own (training/engines/probe.py). An engine that is not installed, or
that refuses the recipe, is reported and left out.

The formulas are those of training.engines.memory.expected_bytes. Engines deviate from them: sharded tensors are padded
to N equal parts, ZeRO-2 also holds the full gradient of a weight split between two ranks, and ZeRO-3 shards no weight
with fewer elements than zero_optimization.stage3_param_persistence_threshold (100,000): on small networks, none at all.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.engines.memory import FLOAT32_BYTES, PARTS, expected_bytes, state_bytes_per_parameter
from training.engines.ranks.forked import local_ranks
from training.planning import per_device_batch_size
from training.recipe import Recipe, RecipeError, load_recipe
from training.results.summary import write_json

ENGINES = ("none", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
_COLORS = {"parameters": "#4477aa", "gradients": "#ee6677", "optimizer_state": "#228833", "activations": "#ccbb44"}
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Cost:
    """The cost of one engine. Bytes are the maximum over ranks.

    expected: bytes by formula, keyed by `PARTS`. scaling_efficiency: images/s over ranks times the images/s of one
    process without an engine; None if that was not measured. peak: resident memory, on GPUs that of tensors.
    """

    engine: str
    ranks: int
    step_seconds: float  # median
    images_per_second: float
    communication_share: float
    scaling_efficiency: float | None
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    expected: dict[str, float]


def settings_for(
    recipe: Recipe, engine: str, *, ranks: int, per_device_batch_size: int, folder: Path
) -> dict[str, Any]:
    """The recipe as plain data for `engine`, with the same number of images per rank for any number of ranks."""
    settings = copy.deepcopy(recipe.settings)
    parallelism = settings["parallelism"]
    parallelism["strategy"] = "deepspeed" if engine.startswith("zero") else engine
    if engine.startswith("zero"):
        own = parallelism["deepspeed"] or {}
        zero = {**(own.get("zero_optimization") or {}), "stage": int(engine.removeprefix("zero"))}
        parallelism["deepspeed"] = {**own, "zero_optimization": zero}
    settings["data"]["train"] |= {"global_batch_size": None, "per_device_batch_size": per_device_batch_size}
    settings["checkpoints"] |= {"sharded": False, "remote": None}
    return {**settings, "load": None, "results_dir": str(folder)}


def compare_engines(
    recipe: Recipe, engines: Sequence[str], *, ranks: int, steps: int, timeout_seconds: float
) -> tuple[list[Cost], dict[str, str]]:
    """Measure each of `engines`; returns their costs, and why others were left out."""
    per_device = per_device_batch_size(recipe, world_size=ranks)
    state_bytes = state_bytes_per_parameter(recipe.optimizer)
    costs: list[Cost] = []
    left_out: dict[str, str] = {}
    alone: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            world_size = 1 if engine == "none" else ranks
            given = settings_for(
                recipe, engine, ranks=world_size, per_device_batch_size=per_device, folder=Path(folder)
            )
            print(f"{engine} on {world_size} {'rank' if world_size == 1 else 'ranks'} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                found = _run(
                    given, Path(folder) / engine, ranks=world_size, of=ranks, steps=steps, timeout=timeout_seconds
                )
            except _LeftOutError as error:
                left_out[engine] = str(error)
                print(f"  left out: {error}", file=sys.stderr, flush=True)
                continue
            cost = _cost(engine, found, per_device_batch_size=per_device, state_bytes=state_bytes, alone=alone)
            alone = cost.images_per_second if engine == "none" else alone
            costs.append(cost)
            print(f"  {cost.step_seconds:.3g} s a step; took {time.monotonic() - started:.0f} s", file=sys.stderr)
    return costs, left_out


def format_table(costs: Sequence[Cost], left_out: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Markdown: how it was measured, one row per engine, and the engines left out."""
    lines = [
        f"# Engines: {facts['run_name']}",
        "",
        f"{facts['date']}, {facts['hardware']}, load {facts['load']:g} beforehand; {facts['versions']}. "
        f"{facts['ranks']} ranks with "
        f"{facts['threads']} threads each; {facts['model']}, {facts['num_parameters']:,} parameters, "
        f"{facts['image_size']} px, {facts['per_device_batch_size']} images a rank, {facts['optimizer']}, "
        f"{facts['precision']}. Median of {facts['steps']} steps after two.",
        "",
        "Memory is that of the rank that has most, in MB (10⁶ bytes); in brackets what the formula says. Activations: "
        "what a step holds when its backward pass begins, gathered weights included. Peak: "
        + ("tensors on the GPU." if facts["on_gpu"] else "the whole process's resident memory."),
        "",
        "| engine | ranks | step, s | images/s | scaling | communication | parameters | gradients | optimizer state "
        "| activations | peak |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(cost) for cost in costs),
        "",
        *(f"- {engine} is left out: {reason}" for engine, reason in left_out.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def plot_costs(costs: Sequence[Cost], path: Path, *, title: str) -> None:
    """Plot each part of the memory per rank, with a black line at the formulas' sum; and throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(
        1, 2, figsize=(11, 1.7 + 0.5 * len(costs)), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    names = [f"{cost.engine} ({cost.ranks})" for cost in costs]
    begins = [0.0] * len(costs)
    for part, color in _COLORS.items():
        sizes = [getattr(cost, part) / 1e6 for cost in costs]
        memory.barh(names, sizes, left=begins, color=color, label=part.replace("_", " "), height=0.6)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    for row, cost in enumerate(costs):
        expected = sum(cost.expected.values()) / 1e6
        memory.plot(
            [expected] * 2, [row - 0.42, row + 0.42], color="black", label=None if row else "formula, first three"
        )
    memory.set_xlabel("MB a rank")
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncol=5)
    bars = speed.barh(names, [cost.images_per_second for cost in costs], color="#999999", height=0.6)
    speed.bar_label(bars, [_efficiency_text(cost) for cost in costs], padding=3, fontsize=8)
    speed.margins(x=0.3)
    speed.set_xlabel("images/s of all ranks, and share of linear scaling")
    memory.invert_yaxis()  # `speed` shares it
    for axes in (memory, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit)
    try:
        recipe = load_recipe(options.file, options.overrides)
        load = os.getloadavg()[0]  # before our own processes add to it
        costs, left_out = compare_engines(
            recipe, options.engines, ranks=options.ranks, steps=options.steps, timeout_seconds=options.timeout
        )
        if not costs:
            raise RecipeError("", "every engine was left out: " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
        prefix = Path(options.output or recipe.results_dir / f"{recipe.run_name}_engines")
        text = _write(recipe, costs, left_out, prefix, options, load=load)
    except (RecipeError, OSError) as error:
        print(f"compare_engines: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        print("compare_engines: stopped; its processes are ended, and nothing is written", file=sys.stderr)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 128 + signal.SIGINT
    print(text)
    print(f"written: {prefix}.md, .json, .png")
    return 0


def _exit(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


class _LeftOutError(Exception):
    """Why an engine was not measured, in one line."""


def _run(
    given: dict[str, Any], folder: Path, *, ranks: int, of: int, steps: int, timeout: float
) -> list[dict[str, Any]]:
    """Start the ranks and wait for them; returns each rank's measurements."""
    folder.mkdir()
    (folder / "given.json").write_text(json.dumps({"recipe": given, "steps": steps}))
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads(of))}
    with local_ranks(_measure, folder, outputs=logs, environment=environment) as processes:
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                break  # the other ranks would wait for it until the timeout
            if time.monotonic() > deadline:
                raise _LeftOutError(f"was not done after {timeout:g} s (--timeout)")
            time.sleep(_PAUSE_SECONDS)
    found = [_read(folder / f"{rank}.json") for rank in range(ranks)]
    refused = next((one["refused"] for one in found if one and "refused" in one), None)
    if refused is not None:
        raise _LeftOutError(refused)
    if None in found:
        log = logs[found.index(None)].read_text(errors="replace").strip().splitlines()
        raise _LeftOutError(f"failed: {log[-1] if log else 'ended without a word'}")
    return [one for one in found if one is not None]


def _measure(folder: Path) -> int:
    # Here, since only the ranks need Composer; where ranks are forked, it is imported already.
    from training.engines.ranks.preload import probe

    return probe.main([str(folder / "given.json"), str(folder / f"{os.environ['RANK']}.json")])


def _cost(
    engine: str,
    found: list[dict[str, Any]],
    *,
    per_device_batch_size: int,
    state_bytes: float,
    alone: float | None,
) -> Cost:
    ranks = len(found)
    seconds = statistics.median(max(steps) for steps in zip(*(one["step_seconds"] for one in found), strict=True))
    rate = per_device_batch_size * ranks / seconds
    shares = [one["communication_seconds"] / one["profiled_seconds"] for one in found]
    return Cost(
        engine=engine,
        ranks=ranks,
        step_seconds=seconds,
        images_per_second=rate,
        communication_share=statistics.mean(shares),
        scaling_efficiency=1.0 if engine == "none" else alone and rate / (ranks * alone),
        **{part: max(one[part] for one in found) for part in (*PARTS, "activations")},
        peak=max(one["device_peak"] or one["resident_peak"] for one in found),
        expected=expected_bytes(
            engine, num_parameters=found[0]["num_parameters"], state_bytes=state_bytes, ranks=ranks
        ),
    )


def _write(
    recipe: Recipe,
    costs: Sequence[Cost],
    left_out: Mapping[str, str],
    prefix: Path,
    options: argparse.Namespace,
    *,
    load: float,
) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "run_name": recipe.run_name,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "load": round(load, 1),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "mosaicml", "deepspeed")),
        "ranks": options.ranks,
        "threads": _threads(options.ranks),
        "steps": options.steps,
        "model": recipe.model["name"],
        "num_parameters": round(costs[0].expected["parameters"] / FLOAT32_BYTES * _shards(costs[0])),
        "image_size": recipe.data.train.image_size,
        "per_device_batch_size": per_device_batch_size(recipe, world_size=options.ranks),
        "optimizer": recipe.optimizer["name"],
        "precision": recipe.precision,
        "on_gpu": torch.cuda.is_available(),
        "overrides": list(options.overrides),
    }
    text = format_table(costs, left_out, facts)
    Path(f"{prefix}.md").write_text(text)
    write_json({"facts": facts, "engines": [asdict(cost) for cost in costs], "left_out": left_out}, f"{prefix}.json")
    plot_costs(costs, Path(f"{prefix}.png"), title=f"{recipe.run_name}: {facts['model']} on {facts['hardware']}")
    return text


def _row(cost: Cost) -> str:
    parts = (f"{getattr(cost, part) / 1e6:,.1f} ({cost.expected[part] / 1e6:,.1f})" for part in PARTS)
    cells = [
        cost.engine, str(cost.ranks), f"{cost.step_seconds:.3f}", f"{cost.images_per_second:.1f}",
        _efficiency_text(cost), f"{cost.communication_share:.0%}", *parts,
        f"{cost.activations / 1e6:,.1f}", f"{cost.peak / 1e6:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _efficiency_text(cost: Cost) -> str:
    return "-" if cost.scaling_efficiency is None else f"{cost.scaling_efficiency:.0%}"


def _shards(cost: Cost) -> int:
    return cost.ranks if cost.engine in ("fsdp", "zero3") else 1


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the rank ended before or while writing
        return None


def _threads(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({_cpu_model() or platform.machine()})"


def _cpu_model() -> str | None:
    """From /proc/cpuinfo, which only Linux has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.engines.compare", description="What each engine costs for one recipe."
    )
    parser.add_argument("-f", "--file", required=True, metavar="RECIPE", help="the recipe")
    parser.add_argument("--ranks", type=_at_least(1), required=True, metavar="N", help="processes on this machine")
    parser.add_argument("--steps", type=_at_least(1), default=5, metavar="K", help="steps to time (default 5)")
    parser.add_argument(
        "--engines", type=_engines, default=["none", "ddp", "fsdp", "zero1", "zero2", "zero3"], metavar="A,B",
        help=f"some of {', '.join(ENGINES)}; zero<S> is DeepSpeed with ZeRO stage S (default: all but zero0)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=_at_least(1), default=900, metavar="SECONDS", help="limit for each engine (default 900)"
    )
    parser.add_argument(
        "--output", metavar="PREFIX", help="where to write PREFIX.md, .json and .png (default: in the recipe's results)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to set")
    return parser


def _engines(text: str) -> list[str]:
    chosen = text.split(",")
    for engine in chosen:
        if engine not in ENGINES:
            raise argparse.ArgumentTypeError(f"{engine!r} is none of {', '.join(ENGINES)}")
    return sorted(set(chosen), key=ENGINES.index)


def _at_least(least: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
