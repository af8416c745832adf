"""Shared by the benchmarks: medians with their intervals, verdicts, and descriptions of hardware and versions."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, its 95 % confidence interval, quartiles and range."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    low, high = median_interval(len(ordered))
    numbers = {
        "median": quartiles[1],
        "low": ordered[low],
        "high": ordered[high],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": ordered[0],
        "max": ordered[-1],
    }
    return {name: round(value, 4) for name, value in numbers.items()}


def median_interval(count: int) -> tuple[int, int]:
    """Indices into `count` sorted values between which the true median lies with a probability of 95 % or more.

    Fewer than six values give the full range, which does not reach 95 %.
    """
    # The number of values below the median is binomial: cut off at most 2.5 % at either end.
    low, below = 0, 0.5**count
    while below + math.comb(count, low + 1) * 0.5**count <= 0.025:
        low += 1
        below += math.comb(count, low) * 0.5**count
    return low, count - 1 - low


def verdict(values: dict[str, float], goal: float) -> str:
    """Whether a `spread` is at most `goal`: met, missed or open."""
    if values["high"] <= goal:
        return "met"
    return "missed" if values["low"] > goal else "open"


def excess_over_share(ours: Sequence[float], peers: Sequence[float], *, share: float) -> dict[str, float]:
    """The `spread` of our overhead less `share` of a peer's, from ratios to one baseline, round by round.

    At most 0 (see `verdict`) where our overhead is at most that share of theirs.
    """
    return spread([(mine - 1) - share * (theirs - 1) for mine, theirs in zip(ours, peers, strict=True)])


def time_step(step: Callable[[], object], device: torch.device, steps: int) -> tuple[float, float]:
    """(cost, wall time) of a step in ms, the mean of `steps`.

    The cost is the time between two events on a GPU, and CPU-seconds of this process on a CPU.
    """
    on_gpu = device.type == "cuda"
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
    gc.disable()
    try:
        if on_gpu:
            torch.cuda.synchronize()
            events[0].record()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        if on_gpu:
            events[1].record()
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        gc.enable()
    cost_ms = events[0].elapsed_time(events[1]) if on_gpu else cpu * 1e3
    return cost_ms / steps, wall * 1e3 / steps


def progress(text: str) -> None:
    """Print one line on stderr, overwriting the last on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """A text table with left-aligned columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


def cost_of_process(command: Sequence[str], *, cwd: Path, said: Path, status: int = 0) -> tuple[float, float]:
    """CPU-seconds, of it and of those it waited for, and wall-clock seconds of a process; its output goes to `said`.

    Raises RuntimeError for another exit status than `status`.
    """
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    with said.open("w+") as file:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file)
        _, ended, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(ended)  # wait4 has reaped it already
        if process.returncode != status:
            file.seek(0)
            raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}: {file.read()}")
    return usage.ru_utime + usage.ru_stime, wall


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware that the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found: dict[str, Any] = {"cpu": model, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": getattr(torch, "version").cuda}  # noqa: B009 (its stubs lack it)
    return found


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the installed ones of `libraries`, by package name."""
    found = {"python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
