"""Prints what this machine is, as JSON: GPU, driver, versions, cores. A process of its own, since CUDA may crash it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

# Without these a recipe does not run; the others are told for the record.
NEEDED = ("torch", "torchvision", "numpy", "mosaicml", "omegaconf", "torchmetrics", "matplotlib", "pillow", "pytest")
ALSO = (
    "triton", "transformers", "timm", "scikit-learn", "pytest-timeout", "pytorch-optimizer", "antialiased-cnns",
    "safetensors", "numba", "deepspeed", "ffcv",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """The machine as plain data; `packages` maps names to versions, null for what is not installed."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": getattr(torch, "version").cuda,  # noqa: B009 (torch's stubs lack it)
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "gpus": [],
        "packages": {name: _version(name) for name in (*NEEDED, *ALSO)},
        "decoder": _decoder(),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": facts.name,
                "memory_gb": round(facts.total_memory / 1e9, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "multiprocessors": facts.multi_processor_count,
            }
        )
    if found["gpus"]:  # a driver that is too old lists the GPU and fails at the first kernel
        ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        assert (ones @ ones).sum().item() == 64**3
    return found


def _decoder() -> str:
    """The decoder of .beton files that works here, or why there is none."""
    from data.decoding.decode import make_decoder

    try:
        return make_decoder().name
    except ModuleNotFoundError as error:
        return f"none: {error}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(environment()))
