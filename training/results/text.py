"""Formats summaries for a terminal, and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as aligned lines for the terminal."""
    hardware = summary.get("hardware") or {}
    gpus = hardware.get("gpus") or {}
    device = ", ".join(f"{count} × {name}" for name, count in gpus.items()) or hardware.get("cpu") or "unknown"
    processes = summary.get("world_size") or 1
    epochs = f"{summary['epochs']}" + (" (resumed)" if summary.get("resumed") else "")
    lines = [
        ("run", summary["run_name"]),
        ("top-1", f"{format_top1(summary['top1'])} (best {format_top1(summary['best_top1'])})"),
        ("loss", format_loss(summary["loss"])),
        *([("test", _format_test(summary["test"]))] if summary.get("test") else []),
        ("epochs", epochs),
        ("time", _format_times(summary)),
        ("throughput", format_rate(summary["images_per_second"])),
        ("parameters", f"{summary['parameters']:,}"),
        ("algorithms", ", ".join(summary["algorithms"]) or "none"),
        ("seed", str(summary["seed"])),
        ("hardware", f"{device}, {processes} {'process' if processes == 1 else 'processes'}"),
    ]
    return align(lines)


def format_seconds(seconds: float | None) -> str:
    """0:42, 12:05 or 3:07:41; `-:--` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format_test(test: Mapping[str, Any]) -> str:
    return f"top-1 {format_top1(test['top1'])}, loss {format_loss(test['loss'])} ({test['checkpoint']}, test split)"


def is_known(value: Any) -> bool:
    """Whether `value` was measured and is finite."""
    return value is not None and math.isfinite(value)


def format_top1(value: float | None) -> str:
    """A share of 1 as a percentage: 0.9833 is "98.33 %"."""
    return f"{100 * value:.2f} %" if value is not None and is_known(value) else "n/a"


def format_loss(value: float | None) -> str:
    """Four decimals; NaN is shown as such."""
    return f"{value:.4f}" if value is not None else "n/a"


def _format_times(summary: Mapping[str, Any]) -> str:
    total, training = format_seconds(summary["seconds"]), format_seconds(summary.get("train_seconds"))
    if summary.get("resumed"):  # the first covers the last session, the second all sessions
        return f"{total} since it was resumed, {training} of training in all"
    return f"{total}, {training} of it training"


def format_exact_seconds(value: float | None) -> str:
    """Seconds to a tenth: "1,234.5 s"."""
    return f"{value:,.1f} s" if value is not None and is_known(value) else "n/a"


def format_rate(value: float | None) -> str:
    """Whole images per second."""
    return f"{value:,.0f} images/s" if value is not None and is_known(value) else "n/a"


def format_macs(value: float | None) -> str:
    """Multiply-adds to three digits with an SI prefix: 4.1e9 is "4.1 G"."""
    if value is None or not is_known(value):
        return "n/a"
    power = min(int(math.log10(value)) // 3, 6) if value >= 1000 else 0
    return f"{value / 1000**power:.3g} {['', 'K', 'M', 'G', 'T', 'P', 'E'][power]}".rstrip()


def align(lines: Sequence[tuple[str, str]]) -> str:
    """Names and values as two columns."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)
