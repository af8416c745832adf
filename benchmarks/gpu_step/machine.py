"""What the device reaches at best: a matrix product's FLOP/s in each precision, and a copy's bytes/s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.algorithm_variants import DTYPES
from benchmarks.measuring import time_step

_Made = tuple[Callable[[], Any], float]  # work, and how many units of it one call does
_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512, 1024)}  # of square matrices
_COPIED_MIB = {"cuda": (256, 1024, 4096), "cpu": (32, 64, 128)}


def measure_machine(device: torch.device, precisions: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """`flops`: precision -> FLOP/s of the best size, `bytes_per_second` of a copy, and each size's own figure.

    precisions: of `DTYPES`; fp32 is measured as torch multiplies it by default, which is without TF32. The matrices are
    random, since a GPU draws less power, and runs faster, on zeros. A byte that is copied counts twice, read and
    written. seconds: for each size. A size that does not fit into memory is left out.
    """
    products = {
        precision: _best({side: _product(device, precision, side) for side in _SIDES[device.type]}, device, seconds)
        for precision in precisions
    }
    copies = _best({mib: _copy(device, mib) for mib in _COPIED_MIB[device.type]}, device, seconds)
    return {
        "flops": {precision: max(found.values(), default=None) for precision, found in products.items()},
        "bytes_per_second": max(copies.values(), default=None),
        "flops_by_side": products,
        "bytes_per_second_by_mib": copies,
    }


def _best(makers: dict[int, Callable[[], _Made]], device: torch.device, seconds: float) -> dict[int, float]:
    """Size -> units of work per second, from the fastest of several measurements."""
    found = {}
    for size, make in makers.items():
        try:
            work, units = make()
            time_step(work, device, 2)  # which loads the library, and its kernel
            once_ms = max(time_step(work, device, 1)[1], 1e-3)
            steps = max(1, round(seconds * 1e3 / 5 / once_ms))
            fastest_ms, begun = float("inf"), time.monotonic()
            while time.monotonic() - begun < seconds:
                cost_ms, wall_ms = time_step(work, device, steps)
                fastest_ms = min(fastest_ms, cost_ms if device.type == "cuda" else wall_ms)
            found[size] = units / fastest_ms * 1e3
        except RuntimeError:  # out of memory, or a precision that this device cannot multiply
            continue
    return found


def _product(device: torch.device, precision: str, side: int) -> Callable[[], _Made]:
    def make() -> _Made:
        one, other = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(one)
        return lambda: torch.mm(one, other, out=out), 2.0 * side**3

    return make


def _copy(device: torch.device, mib: int) -> Callable[[], _Made]:
    def make() -> _Made:
        source = torch.ones(mib << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * source.numel()

    return make
