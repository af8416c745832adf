"""The phases of a plan: epochs whose steps cost the same, wherever they lie in the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.planning import Epoch, Plan

_LARGEST_WINDOW = 16


@dataclass(frozen=True)
class Phase:
    """Epochs of one image size, batch size, and set of acting algorithms.

    first_epoch: one of them, counted from 0. epochs: their number. steps: of each. macs: multiply-adds of a step of all
    ranks, with its backward pass. images: of an epoch.
    """

    first_epoch: int
    epochs: int
    steps: int
    images: int
    image_size: int
    global_batch_size: int
    macs: float
    window_steps: int
    notes: tuple[str, ...]


def phases_of(plan: Plan) -> list[Phase]:
    """The phases of `plan`, in the order in which they begin."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, epoch in enumerate(plan.epochs):
        key = (
            epoch.image_size, epoch.global_batch_size, epoch.frozen, epoch.test_crop, epoch.suspended, epoch.passes,
            None if epoch.selecting is None else (epoch.selecting.keep, epoch.selecting.steps.step),
        )  # fmt: skip
        groups.setdefault(key, []).append(index)
    return [_phase(plan.epochs[indices[0]], indices) for indices in groups.values()]


def chosen_phases(phases: Sequence[Phase], *, most: int) -> list[int]:
    """Indices of at most `most` phases to measure: all of them, or those spread evenly over their steps' cost."""
    if len(phases) <= most:
        return list(range(len(phases)))
    by_cost = sorted(range(len(phases)), key=lambda index: phases[index].macs)
    return sorted({by_cost[round(number * (len(by_cost) - 1) / (most - 1))] for number in range(most)})


def _phase(epoch: Epoch, indices: Sequence[int]) -> Phase:
    notes = [
        *(["test-time crop"] if epoch.test_crop else []),
        *(["last layers only"] if epoch.frozen else []),
        *(f"no {name}" for name in epoch.suspended),
        *([f"{epoch.passes:g} passes a step"] if epoch.passes > 1 else []),
        *([f"trains {epoch.selecting.keep:g} of the images"] if epoch.selecting else []),
    ]
    # SAM takes a second pass at every interval-th step, and selective backpropagation selects at every interval-th:
    # only whole intervals have the same cost.
    interval = round(1 / (epoch.passes - 1)) if epoch.passes > 1 else 1
    if epoch.selecting is not None:
        interval = math.lcm(interval, epoch.selecting.steps.step)
    return Phase(
        first_epoch=indices[0],
        epochs=len(indices),
        steps=epoch.steps,
        images=epoch.images,
        image_size=epoch.image_size,
        global_batch_size=epoch.global_batch_size,
        macs=epoch.total_macs / epoch.steps,
        window_steps=min(interval, _LARGEST_WINDOW),
        notes=tuple(notes),
    )
