"""What was measured, as plain data and as text of at most 120 columns."""

from __future__ import annotations

import functools
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.algorithm_variants import OURS
from benchmarks.gpu_step.plan import GOAL_NETWORK, GOAL_PRECISION, GOAL_PX, Case
from benchmarks.gpu_step.running import Result, build_network
from benchmarks.measuring import columns, excess_over_share, spread, verdict

SCHEMA = 1
WIDTH = 120
GOAL_IMAGES_PER_SECOND, GOAL_GPU = 3200, "H100"
GOAL_BLURPOOL = 0.5  # our overhead over that of Composer's
# Images/s of one GPU in the best runs of ResNet-50 on a single node, as published by MLPerf Training.
MLPERF = {"A100": 3398, "H100": 7160, "H200": 7950}
PYTORCH_ON_A100 = (2470, 2600)
FLOPS_PER_FORWARD_MAC = 2 * 3  # a multiplication and an addition; the backward pass does both of its products


def make_report(
    groups: Sequence[Sequence[Result]],
    *,
    titles: Sequence[str],
    about: dict[str, Any],
    machine: dict[str, Any] | None,
    profile: dict[str, Any] | None,
    seconds: float,
    stopped: bool,
) -> dict[str, Any]:
    """The report as plain data. about: date, settings, hardware, versions. seconds: that all of it took."""
    flops = (machine or {}).get("flops", {})
    return {
        "schema": SCHEMA,
        **about,
        "seconds": round(seconds, 1),
        "stopped": stopped,
        "machine": machine,
        "groups": [
            {"title": title, "rows": [described(result, group, flops.get(result.case.precision)) for result in group]}
            for title, group in zip(titles, groups, strict=True)
        ],
        "profile": profile,
        "goals": goals(groups, gpu=about["hardware"].get("gpu")),
    }


def described(result: Result, group: Sequence[Result], peak_flops: float | None) -> dict[str, Any]:
    """A result for the JSON file. The ratio is that of its step's time to the first of its group, round by round."""
    case, times = result.case, result.step_ms
    row: dict[str, Any] = {
        "name": case.name,
        "network": case.network,
        "image_size": case.image_size,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "channels_last": case.channels_last,
        "compiled": case.compiled,
        "algorithm": case.algorithm,
        "library": case.library,
        "label": case.label,
        "status": result.status,
        "note": result.note,
        "n": len(result.times_ms),
    }
    if times:
        rate = images_per_second(result)
        done = rate * flops_per_image(case.network, trained_px(case))
        row |= {
            "step_ms": spread(times),
            "images_per_second": round(rate, 1),
            "of_peak": round(done / peak_flops, 4) if peak_flops else None,
            "ratio": spread(ratios) if (ratios := ratios_to_first(result, group)) else None,
            "ready_seconds": round(result.ready_seconds or 0.0, 1),
            "peak_bytes": result.peak_bytes,
            "graph_breaks": result.graph_breaks,
        }
    return row


def images_per_second(result: Result) -> float:
    """At the median step."""
    return result.case.batch_size / statistics.median(result.step_ms) * 1e3


def ratios_to_first(result: Result, group: Sequence[Result]) -> list[float]:
    """Of step times, round by round; empty if one of both has no whole round."""
    return [mine / base for mine, base in zip(result.times_ms, group[0].times_ms, strict=False)]


def trained_px(case: Case) -> int:
    """The size of the images that the network gets."""
    return case.image_size // 2 if case.algorithm == "progressive_resizing" else case.image_size


@functools.cache
def flops_per_image(network: str, image_size: int) -> float:
    """Of a forward and a backward pass: those of convolutions and matrix products, as recipes count them for MFU."""
    from models.summary import count_forward_macs

    with torch.device("meta"):
        model = build_network(network, image_size=image_size)
    return float(FLOPS_PER_FORWARD_MAC * count_forward_macs(model, image_size=image_size))


# --- goals -----------------------------------------------------------------------------------------------------------


def goals(groups: Sequence[Sequence[Result]], *, gpu: str | None) -> list[dict[str, Any]]:
    """The goals for which there are figures: verdict (met, missed, open), text and figures."""
    found = [speed_goal(groups, gpu=gpu)] if gpu else []
    for group in groups:
        found.append(blurpool_goal(group))
    return [goal for goal in found if goal]


def speed_goal(groups: Sequence[Sequence[Result]], *, gpu: str) -> dict[str, Any] | None:
    """The fastest step of those that the goal is about, whatever its batch size."""
    fitting = [result for group in groups for result in group if result.step_ms and _is_about_speed(result.case)]
    if not fitting:
        return None
    best = max(fitting, key=images_per_second)
    rate, goal = images_per_second(best), GOAL_IMAGES_PER_SECOND
    limit_ms = best.case.batch_size / goal * 1e3
    judged = verdict(spread(best.step_ms), limit_ms)
    text = f"{rate:,.0f} images/s on one {gpu}, goal {goal:,} on one {GOAL_GPU} ({best.case.name})"
    return {"goal": "speed", "verdict": judged if GOAL_GPU in gpu else f"{judged} here", "text": text,
            "images_per_second": round(rate, 1), "required": goal}  # fmt: skip


def _is_about_speed(case: Case) -> bool:
    wanted = (case.network, case.image_size, case.precision) == (GOAL_NETWORK, GOAL_PX, GOAL_PRECISION)
    return wanted and case.plain and case.channels_last and case.compiled


def blurpool_goal(group: Sequence[Result]) -> dict[str, Any] | None:
    """Our BlurPool's overhead beside Composer's in one group; None without both."""
    by_who = {result.case.who: result for result in group if result.case.algorithm == "blurpool"}
    if group[0].case.network != GOAL_NETWORK or OURS not in by_who or "composer" not in by_who:
        return None
    ours, composers = (ratios_to_first(by_who[who], group) for who in (OURS, "composer"))
    if not ours or not composers:
        return None
    overhead, theirs = (statistics.median(ratios) - 1 for ratios in (ours, composers))
    mode = "compiled" if group[0].case.compiled else "eager"
    text = f"BlurPool, {mode}: {overhead:+.2%} of a step, Composer's {theirs:+.2%}; "
    text += f"goal at most {GOAL_BLURPOOL:g} of Composer's"
    judged = verdict(excess_over_share(ours, composers, share=GOAL_BLURPOOL), 0.0)
    return {"goal": f"blurpool {mode}", "verdict": judged, "text": text, "overhead": round(overhead, 5),
            "composers_overhead": round(theirs, 5), "required": GOAL_BLURPOOL}  # fmt: skip


# --- text ------------------------------------------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """The whole report as text."""
    parts = [_heading(report), _machine(report["machine"]), _table(report), _profile(report["profile"]), _goals(report)]
    return "\n\n".join(part for part in parts if part)


_HEAD = ("", "images/s", "+-", "ms", "of peak", "GiB", "ratio", "n", "ready s")


def _table(report: dict[str, Any]) -> str:
    lines: list[tuple[str, ...]] = [_HEAD]
    notes: list[str] = [""]
    for group in report["groups"]:
        rows = _together(group["rows"])
        lines.append((group["title"], *[""] * (len(_HEAD) - 1)))
        notes.append("")
        for row in rows:
            lines.append(_cells(row))
            notes.append("" if "step_ms" in row else f"{row['status']}{': ' if row['note'] else ''}{row['note']}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    printed = []
    for line, note in zip(lines, notes, strict=True):
        cells = [line[0].ljust(widths[0])]
        cells += [note] if note else [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        printed.append(short("  ".join(cells).rstrip(), WIDTH))
    return "\n".join(printed)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    label = f"  {row['label']}"
    if "step_ms" not in row:
        return (label, *[""] * (len(_HEAD) - 1))
    step, ratio = row["step_ms"], row["ratio"]
    return (
        label,
        f"{row['images_per_second']:,.{0 if row['images_per_second'] >= 100 else 1}f}",
        f"{(step['q3'] - step['q1']) / 2 / step['median']:.1%}" if row["n"] else "",
        f"{step['median']:.1f}" if step["median"] >= 10 else f"{step['median']:.2f}",
        "" if row["of_peak"] is None else f"{row['of_peak']:.1%}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        "" if ratio is None else f"{ratio['median']:.3f}",
        f"{row['n']}" if row["n"] else "alone",
        f"{row['ready_seconds']:.0f}",
    )


def _together(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a group, as one if all were left out for one reason."""
    if len(group) > 1 and all("step_ms" not in row for row in group) and len({row["note"] for row in group}) == 1:
        return [{**group[0], "label": f"{group[0]['label']} and {len(group) - 1} more"}]
    return list(group)


def _heading(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    device = hardware.get("gpu") or f"{hardware['cpu']}, {report['settings']['threads']} threads"
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    stopped = "; stopped before its end" if report["stopped"] else ""
    backend = report["settings"]["backend"]
    compiler = "" if backend == "inductor" else f", compiled means torch.compile(backend={backend!r})"
    tuned = ", with cudnn.benchmark" if report["settings"]["cudnn_benchmark"] else ""
    first = f"{report['date']}, {device}, {report['seconds']:.0f} s{tuned}{compiler}{stopped}"
    return "\n".join([*textwrap.wrap(first, WIDTH), *textwrap.wrap(said, WIDTH)])


def _machine(machine: dict[str, Any] | None) -> str:
    if machine is None:
        return ""
    peaks = ", ".join(f"{name} {flops / 1e12:,.4g} TFLOP/s" for name, flops in machine["flops"].items() if flops)
    copied = machine["bytes_per_second"]
    copying = f"; copies {copied / 1e9:,.4g} GB/s read and written" if copied else ""
    return f"measured peak of matrix products: {peaks}{copying}"


def _profile(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return ""
    if "error" in profile:
        return short(f"no profile of {profile['name']}: {profile['error']}", WIDTH)
    lines = [["where the time goes", "share", "ms a step", "runs a step"]]
    for row in profile["groups"]:
        runs = f"{row['count'] / profile['steps']:.0f}" if row["count"] else ""
        lines.append([row["group"], f"{row['share']:.1%}", f"{row['us'] / profile['steps'] / 1e3:.3f}", runs])
    kernels = [["the longest", "share", "group", "name"]]
    for index, row in enumerate(profile["top"], 1):
        kernels.append([f"{index}", f"{row['share']:.1%}", row["group"], row["name"]])
    shown = "\n".join(short(line, WIDTH) for line in columns(kernels).splitlines())
    return f"{profile['name']}, {profile['ms']:.2f} ms a step under the profiler\n{columns(lines)}\n\n{shown}"


def _goals(report: dict[str, Any]) -> str:
    lines = [short(f"{goal['verdict']:6}  {goal['text']}", WIDTH) for goal in report["goals"]]
    if report["hardware"].get("gpu"):
        theirs = ", ".join(f"{gpu} {rate:,}" for gpu, rate in MLPERF.items())
        low, high = PYTORCH_ON_A100
        lines.append(f"for comparison, ResNet-50 images/s of one GPU: MLPerf on a single node: {theirs};")
        lines.append(f"PyTorch on one A100: {low:,} to {high:,}")
        lines += _beside_mlperf(report)
    return "\n".join(lines)


def _beside_mlperf(report: dict[str, Any]) -> list[str]:
    speed = next((goal for goal in report["goals"] if goal["goal"] == "speed"), None)
    known = next((gpu for gpu in MLPERF if gpu in report["hardware"]["gpu"]), None)
    if speed is None or known is None:
        return []
    return [f"here {speed['images_per_second'] / MLPERF[known]:.0%} of MLPerf's on the {known}"]


def short(line: str, most: int) -> str:
    """`line`, with its end cut off if it has more than `most` characters."""
    return line if len(line) <= most else f"{line[: most - 3]}..."
