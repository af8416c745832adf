"""Where the time of a training step goes, from torch.profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_step.kernels import Kernel, shares, top
from benchmarks.measuring import time_step

_WARM_STEPS = 1
_STEPS = {"cuda": 5, "cpu": 2}
_TOP = 10
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def profile_step(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`ms` of a step under the profiler, `groups` with their shares of it, and the `top` ten kernels.

    On a CPU, operations of torch take the kernels' place, with the time that they did not spend in another one.
    Raises RuntimeError where the profiler sees nothing on the device.
    """
    steps = _STEPS[device.type]
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]):  # its first use loads and sets up CUPTI
        time_step(step, device, _WARM_STEPS)
    with profile(activities=[kind]) as found:
        _, wall_ms = time_step(step, device, steps)
    if device.type == "cuda":
        kernels = device_kernels(_trace(found))
        if not kernels:
            raise RuntimeError("the profiler saw no kernel on this GPU; does this user have access to its counters?")
        span_us = _span_us(kernels)
    else:
        kernels = _operations(found)
        span_us = max(wall_ms * 1e3 * steps, sum(kernel.duration_us for kernel in kernels))
    return {
        "steps": steps,
        "ms": span_us / steps / 1e3,
        "groups": shares(kernels, span_us=span_us),
        "top": top(kernels, number=_TOP, span_us=span_us),
    }


def device_kernels(trace: dict[str, Any]) -> list[Kernel]:
    """What ran on the device, of a trace in Chrome's format as `export_chrome_trace` writes it."""
    return [
        Kernel(event["name"], float(event["dur"]), float(event["ts"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE
    ]


def _trace(found: profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))


def _span_us(kernels: list[Kernel]) -> float:
    starts = [kernel.start_us or 0.0 for kernel in kernels]
    ends = [start + kernel.duration_us for start, kernel in zip(starts, kernels, strict=True)]
    return max(ends) - min(starts)


def _operations(found: profile) -> list[Kernel]:
    return [
        Kernel(average.key, average.self_cpu_time_total, count=average.count)
        for average in found.key_averages()
        if average.self_cpu_time_total > 0
    ]
