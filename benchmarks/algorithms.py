"""The cost of each algorithm: a training step with it over one without, ours and other libraries', in one run.

    python -m benchmarks.algorithms                                    # from the checkout; needs torch and torchvision
    python -m benchmarks.algorithms --device cuda --image-size 224 --batch-size 256 --compile
    python -m benchmarks.algorithms --only blurpool sam --rounds 60

Every round measures the groups (an algorithm's variants and their own baseline) in a new random order, and the members
of a group in a new random order. A ratio divides two measurements of the same round and group, so that a temporary
slowdown of the machine affects both. The report gives medians over rounds with quartiles; a goal is met or missed if
the median's 95 % confidence interval lies on one side of it, and otherwise open.

On a CPU, the cost of a step is CPU-seconds of this process (other processes cannot add to it, though they can slow
memory down). On a GPU, it is the device's own time between two events; steps run in bfloat16 autocast and, by default,
channels-last. The baseline of channels_last is in NCHW either way. GMAC are the multiply-adds of convolutions and
matrix products in a step, forward and backward; they are counted, so they have no noise.

RandAugment is not measured, since others apply it to PIL images in a loader's workers, before the step; nor is FixRes,
which makes a step cheaper and has no peer. A library that is not installed is reported and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.algorithm_variants import BASELINES, OURS, VARIANTS, Bench, Step, Variant, absent_peers, baseline
from benchmarks.measuring import columns, excess_over_share, hardware, progress, spread, time_step, verdict, versions

GOAL_OVER_PEER = 1.02  # our step over that of the cheapest peer
GOAL_BLURPOOL = 0.5  # our BlurPool's overhead over that of Composer's
FORMATS = {"cpu": "contiguous_format", "cuda": "channels_last"}  # the defaults
LIBRARIES = ("torch", "torchvision", "mosaicml", "antialiased_cnns", "pytorch_optimizer", "timm")


@dataclass
class Row:
    """A variant's measurements, one per round; the baseline's are those of its own group in the same round."""

    variant: Variant
    step: Step
    gmac: float | None = None
    cost_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Ratios to the baseline, round by round."""
        return [cost / base for cost, base in zip(self.cost_ms, self.baseline_ms, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the requested JSON file."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        if not options.fresh_memory:
            keep_freed_memory()
    absent = absent_peers()
    for name, reason in absent.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    memory_format = getattr(torch, options.memory_format)
    bench = Bench(options.model, options.image_size, options.batch_size, device, memory_format, options.compile)
    groups = build_groups(bench, chosen_variants(options.model, options.only, absent))
    measure(groups, bench, rounds=options.rounds, steps=options.steps)
    rows = [row for group in groups for row in group.rows]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "versions": versions(LIBRARIES),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "absent": absent,
        "variants": [described(row) for row in rows],
        "comparisons": comparisons(rows),
        "goals": goals(rows),
    }
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors, as CUDA's allocator, jemalloc and tcmalloc do.

    Otherwise it returns blocks of megabytes to the kernel, and each step pays for new pages: costs then depend more on
    the order of frees than on the work.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-4, 0)  # M_MMAP_MAX: allocate no block by mmap
        c_library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with "auto" resolved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=(__doc__ or "").split("\n")[0])
    known = sorted({variant.algorithm for variant in VARIANTS})
    parser.add_argument("--model", default="resnet50", help="name in torchvision.models")
    parser.add_argument("--image-size", type=int, default=64, help="px")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each variant")
    parser.add_argument("--steps", type=int, default=None, help="steps a measurement; 1 on a CPU, 5 on a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory-format", choices=("auto", *FORMATS.values()), default="auto", help="of all models")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU; several spin and blur CPU-seconds")
    parser.add_argument(
        "--fresh-memory", action="store_true", help="on a CPU, let glibc hand freed memory back, as it does by itself"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="two rounds of a small model, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.image_size, options.batch_size, options.rounds = "resnet18", 32, 2, 2
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_format == "auto":
        options.memory_format = FORMATS[options.device]
    options.steps = options.steps or (5 if options.device == "cuda" else 1)
    return options


def chosen_variants(model: str, only: Iterable[str] | None, absent: Iterable[str]) -> list[Variant]:
    """The requested variants that can be imported and that support the model."""
    has_bottlenecks, has_patches = model in ("resnet50", "resnet101", "resnet152"), model.startswith("vit_")
    return [
        variant
        for variant in VARIANTS
        if variant.who not in absent
        and (only is None or variant.algorithm in only)
        and (has_bottlenecks or not variant.bottleneck_only)
        and (has_patches or not variant.vit_only)
    ]


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """What is measured side by side: an algorithm's variants and the step without it."""

    baseline: Step
    rows: list[Row]


def build_groups(bench: Bench, variants: Iterable[Variant]) -> list[Group]:
    """Make every step, count its multiply-adds and warm it up."""
    groups: dict[str, Group] = {}
    for variant in variants:
        progress(f"preparing {variant.algorithm} ({variant.who})")
        if variant.algorithm not in groups:
            groups[variant.algorithm] = Group(BASELINES.get(variant.algorithm, baseline)(bench), [])
            warm_up(groups[variant.algorithm].baseline, bench)
        step = variant.make(bench)
        gmac = warm_up(step, bench)
        groups[variant.algorithm].rows.append(Row(variant, step, gmac))
    return list(groups.values())


def warm_up(step: Step, bench: Bench) -> float | None:
    """Run `step` a few times; returns its multiply-adds in units of 10⁹, None if it is compiled."""
    counter = FlopCounterMode(display=False)
    with contextlib.nullcontext() if bench.compiled else counter:
        step()
    for _ in range(3 if bench.device.type == "cuda" else 1):
        step()
    return None if bench.compiled else counter.get_total_flops() / 2e9


def measure(groups: list[Group], bench: Bench, *, rounds: int, steps: int) -> None:
    """Fill in every row's measurements, one per round."""
    order = random.Random(0)
    begin = time.monotonic()
    for index in range(rounds):
        gc.collect()
        for group in order.sample(groups, len(groups)):
            base = Row(Variant("", "", "", baseline), group.baseline)
            for row in order.sample([base, *group.rows], len(group.rows) + 1):
                cost_ms, wall_ms = time_step(row.step, bench.device, steps)
                row.cost_ms.append(cost_ms)
                row.wall_ms.append(wall_ms)
            for row in group.rows:
                row.baseline_ms.append(base.cost_ms[0])
        elapsed = time.monotonic() - begin
        progress(f"round {index + 1} of {rounds}, {elapsed / (index + 1) * (rounds - index - 1):.0f} s to go")
    progress("")


# --- reporting -----------------------------------------------------------------------------------------------------


def described(row: Row) -> dict[str, Any]:
    """A row for the JSON file."""
    return {
        "algorithm": row.variant.algorithm,
        "who": row.variant.who,
        "how": row.variant.how,
        "n": len(row.cost_ms),
        "gmac": None if row.gmac is None else round(row.gmac, 4),
        "cost_ms": spread(row.cost_ms),
        "wall_ms": spread(row.wall_ms),
        "ratio_to_baseline": spread(row.ratios()),
    }


def comparisons(rows: list[Row]) -> list[dict[str, Any]]:
    """Each of our variants relative to the cheapest peer of its algorithm, round by round."""
    found = []
    for ours in rows:
        peers = [row for row in rows if row.variant.algorithm == ours.variant.algorithm and row.variant.who != OURS]
        if ours.variant.who != OURS or not peers:
            continue
        cheapest = min(peers, key=lambda row: statistics.median(row.cost_ms))
        ratio = spread([a / b for a, b in zip(ours.cost_ms, cheapest.cost_ms, strict=True)])
        found.append(
            {
                "algorithm": ours.variant.algorithm,
                "how": ours.variant.how,
                "cheapest_peer": cheapest.variant.who,
                "ratio": ratio,
                "goal": GOAL_OVER_PEER,
                "verdict": verdict(ratio, GOAL_OVER_PEER),
            }
        )
    return found


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """Our BlurPool's overhead against Composer's; empty without Composer."""
    blurpools = [row for row in rows if row.variant.algorithm == "blurpool"]
    composers = next((row for row in blurpools if row.variant.who == "composer"), None)
    if composers is None:
        return []
    found = []
    for ours in blurpools:
        if ours.variant.who == OURS:
            excess = excess_over_share(ours.ratios(), composers.ratios(), share=GOAL_BLURPOOL)
            found.append(
                {
                    "goal": f"{ours.variant.how}: overhead at most {GOAL_BLURPOOL:g} of Composer's",
                    "overhead": round(statistics.median(ours.ratios()) - 1, 4),
                    "composers_overhead": round(statistics.median(composers.ratios()) - 1, 4),
                    "verdict": verdict(excess, 0.0),
                }
            )
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    unit = "ms" if report["settings"]["device"] == "cuda" else "CPU-ms"
    head = ["algorithm", "who", "how", "GMAC", f"{unit}/step", "over baseline", "quartiles", "over cheapest peer"]
    beside = {(one["algorithm"], one["how"]): one for one in report["comparisons"]}
    lines = [head]
    for row in report["variants"]:
        ratio, one = row["ratio_to_baseline"], beside.get((row["algorithm"], row["how"]))
        mine = one is not None and row["who"] == OURS
        lines.append(
            [
                row["algorithm"],
                row["who"],
                row["how"],
                "" if row["gmac"] is None else f"{row['gmac']:.2f}",
                f"{row['cost_ms']['median']:.1f}",
                f"{ratio['median']:.3f}",
                f"{ratio['q1']:.3f} to {ratio['q3']:.3f}",
                f"{one['ratio']['median']:.3f} {one['cheapest_peer']}" if one and mine else "",
            ]
        )
    return "\n".join([columns(lines), "", *verdicts(report)])


def verdicts(report: dict[str, Any]) -> list[str]:
    """Each goal, and whether it was met."""
    lines = [f"n = {report['variants'][0]['n']} rounds" if report["variants"] else "nothing was measured"]
    for one in report["comparisons"]:
        ratio = one["ratio"]
        lines.append(
            f"{one['verdict']:6}  {one['algorithm']}, {one['how']}: {ratio['median']:.3f} of {one['cheapest_peer']}'s "
            f"cost (95 %: {ratio['low']:.3f} to {ratio['high']:.3f}); goal {one['goal']:g}"
        )
    for goal in report["goals"]:
        lines.append(
            f"{goal['verdict']:6}  blurpool, {goal['goal']}: {goal['overhead']:+.1%} of a step, "
            f"Composer's {goal['composers_overhead']:+.1%}"
        )
    return lines


if __name__ == "__main__":
    main()
