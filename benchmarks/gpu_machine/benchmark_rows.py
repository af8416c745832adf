"""Rows of a GPU check from the JSON file of `python -m benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_machine.report import Row

OURS = "brisk"  # as algorithm_variants has it, which needs torch

ITEM = "benchmarks.gpu"


def arguments(device: str, *, limit_seconds: float) -> list[str]:
    """Of a benchmark that ends by itself within `limit_seconds`: in small on a CPU."""
    minutes = max(_LEAST_SECONDS, limit_seconds - _OUTSIDE_SECONDS) / 60
    return ["--quick"] if device == "cpu" else ["--minutes", f"{minutes:.2f}"]


_OUTSIDE_SECONDS = 14.0  # of its time, for imports, and for the end of what was begun
_LEAST_SECONDS = 5.0


def benchmark_rows(report: dict[str, Any]) -> list[Row]:
    """The machine's peaks, every variant that was begun, the profile and the goals; what was left out is one row."""
    rows = [_peaks(report["machine"])] if report["machine"] else []
    variants = [row for group in report["groups"] for row in group["rows"]]
    rows += [_variant(row) for row in variants if row["status"] != "left out"]
    left_out = [row for row in variants if row["status"] == "left out"]
    if left_out:
        note = f"{len(left_out)} variants left out, the first of them {left_out[0]['name']}: {left_out[0]['note']}"
        figures = {row["name"]: row["note"] for row in left_out}
        rows.append(Row("benchmark", ITEM, "skipped", note=note, figures=figures))
    if report["profile"]:
        rows.append(_profile(report["profile"]))
    rows += [
        Row("benchmark", f"goal: {goal['goal']}", "passed", note=f"{goal['verdict']}: {goal['text']}", figures=goal)
        for goal in report["goals"]
    ]
    return rows


def _peaks(machine: dict[str, Any]) -> Row:
    reached = ", ".join(f"{name} {flops / 1e12:,.4g} TFLOP/s" for name, flops in machine["flops"].items() if flops)
    copied = machine["bytes_per_second"]
    note = f"{reached}, copies {copied / 1e9:,.4g} GB/s" if copied else reached
    return Row("benchmark", "peaks", "passed" if reached else "failed", note=note or "nothing fits", figures=machine)


def _variant(row: dict[str, Any]) -> Row:
    if row["status"] == "failed" and row["library"] == OURS:
        return Row("benchmark", row["name"], "failed", note=row["note"], figures=row)
    if "step_ms" not in row:  # another library may not run with this torch
        return Row("benchmark", row["name"], "skipped", note=row["note"] or row["status"], figures=row)
    share = "" if row["of_peak"] is None else f", {row['of_peak']:.1%} of the measured peak"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    ratio = "" if row["ratio"] is None else f", {row['ratio']['median']:.3f} of its group's first"
    note = f"{row['images_per_second']:,.0f} images/s{share}{peak}{ratio}, n={row['n']}"
    return Row("benchmark", row["name"], "passed", note=note, figures=row)


def _profile(profile: dict[str, Any]) -> Row:
    if "error" in profile:
        return Row("benchmark", "profile", "failed", note=profile["error"], figures=profile)
    note = ", ".join(f"{row['group']} {row['share']:.0%}" for row in profile["groups"] if row["share"] >= 0.005)
    return Row("benchmark", "profile", "passed", note=f"{profile['name']}: {note}", figures=profile)
