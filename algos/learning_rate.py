"""The learning rate as a pure function of the epochs done.

Composer's schedulers count batches and lag by one; a batch size that changes during the run distorts them (a halved
batch makes a linear decay jump up, a doubled one makes it reach zero early), and two of them do not multiply. Here the
rate of a step depends only on the completed share of the run, so neither batch size nor resumption affects it, and
every algorithm that changes it (`LearningRateModifier`) is applied in turn: a true product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State
from .framework.protocols import LearningRateModifier

Decay = Literal["cosine", "linear", "step", "polynomial", "constant", "piecewise_linear"]


def warmup_decay(
    epoch: float,
    *,
    total_epochs: float,
    warmup_epochs: float = 0.0,
    warmup_start_factor: float = 0.0,
    decay: Decay = "cosine",
    final_factor: float = 0.0,
    power: float = 2.0,
    milestones_epochs: tuple[float, ...] = (),
    step_factor: float = 0.1,
    points: tuple[tuple[float, float], ...] = (),
) -> float:
    """Factor on the peak learning rate after `epoch` epochs (may be fractional).

    Linear from `warmup_start_factor` to 1 over `warmup_epochs` (Goyal 2017, arXiv 1706.02677); then, with t the
    completed share of the remaining epochs (of `total_epochs`) and f = `final_factor`:

        cosine      f + (1 - f) (1 + cos(pi t)) / 2      (Loshchilov 2017, arXiv 1608.03983)
        linear      f + (1 - f) (1 - t)
        polynomial  f + (1 - f) (1 - t)^power
        step        step_factor^(number of milestones_epochs reached)
        constant    1

    piecewise_linear differs: `points` are (epoch, factor) in rising order of epochs, joined by straight lines, and the
    factor is constant before the first and after the last. It excludes a warm-up.

    Raises ValueError for an unknown `decay`, and for piecewise_linear without points.
    """
    _check_decay(decay)
    if decay == "piecewise_linear":
        _check_points(points, decay=decay, warmup_epochs=warmup_epochs)
        return _interpolate(epoch, points)
    if epoch < warmup_epochs:
        return warmup_start_factor + (1.0 - warmup_start_factor) * epoch / warmup_epochs
    if decay == "step":
        return step_factor ** sum(epoch >= milestone for milestone in milestones_epochs)
    done = (epoch - warmup_epochs) / max(total_epochs - warmup_epochs, 1e-12)
    left = 1.0 - min(max(done, 0.0), 1.0)
    shape = {
        "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
        "linear": left,
        "polynomial": left**power,
        "constant": 1.0,
    }[decay]
    return final_factor + (1.0 - final_factor) * shape


class LearningRate(SpeedUp):
    """Sets every parameter group's learning rate before each step: its initial one times `warmup_decay`.

    The run's length must be given in epochs or in batches. A group's initial rate is the one that its optimizer was
    created with; other algorithms that change the rate are applied in the order of the Trainer's list. For the
    settings see `warmup_decay`.

    Raises ValueError for settings out of range and, before the first step, for a warmup longer than the run and for
    additional schedulers, whose rates it would overwrite.
    """

    contract = Contract(owns=[Resource.LEARNING_RATE], after=[Resource.LOADER_SHAPE, Resource.TRAINABLE])
    events = (Event.FIT_START, Event.BATCH_START)

    def __init__(
        self,
        *,
        warmup_epochs: float = 0.0,
        warmup_start_factor: float = 0.0,
        decay: Decay = "cosine",
        final_factor: float = 0.0,
        power: float = 2.0,
        milestones_epochs: tuple[float, ...] = (),
        step_factor: float = 0.1,
        points: tuple[tuple[float, float], ...] = (),
    ) -> None:
        _check_decay(decay)
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs {warmup_epochs} must be 0 or more")
        for name, value in (("warmup_start_factor", warmup_start_factor), ("final_factor", final_factor)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is a share of the peak learning rate and must lie in [0, 1]")
        for name, value in (("power", power), ("step_factor", step_factor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be above 0")
        if decay == "step" and not milestones_epochs:
            raise ValueError("decay: step needs milestones_epochs, the epochs at which the rate is multiplied")
        if decay != "step" and milestones_epochs:
            raise ValueError(
                f"milestones_epochs is {list(milestones_epochs)}, which decay: step alone reads, and decay is {decay}; "
                "leave it out, or change decay"
            )
        if any(milestone <= 0 for milestone in milestones_epochs):
            raise ValueError(f"milestones_epochs {list(milestones_epochs)} must all be above 0")
        _check_points(points, decay=decay, warmup_epochs=warmup_epochs)
        self.warmup_epochs = warmup_epochs
        self._shape: dict[str, Any] = dict(
            warmup_epochs=warmup_epochs,
            warmup_start_factor=warmup_start_factor,
            decay=decay,
            final_factor=final_factor,
            power=power,
            milestones_epochs=tuple(milestones_epochs),
            step_factor=step_factor,
            points=tuple(points),
        )

    def learning_rate(
        self, epoch: float, *, total_epochs: float, initial: float, modifiers: Sequence[LearningRateModifier] = ()
    ) -> float:
        """The rate after `epoch` epochs: `initial` times the schedule's factor, then through each modifier in turn."""
        learning_rate = initial * warmup_decay(epoch, total_epochs=total_epochs, **self._shape)
        for modifier in modifiers:
            learning_rate = modifier.modify_learning_rate(learning_rate, epoch, total_epochs)
        return learning_rate

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set the rate of the next step."""
        total_epochs = run_length_epochs(state)
        if event == Event.FIT_START:
            self._check_run(state, total_epochs)
            return
        epoch = epochs_done(state)
        modifiers = [algorithm for algorithm in state.algorithms if isinstance(algorithm, LearningRateModifier)]
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                initial = group.setdefault("initial_lr", float(group["lr"]))
                learning_rate = self.learning_rate(
                    epoch, total_epochs=total_epochs, initial=float(initial), modifiers=modifiers
                )
                if isinstance(group["lr"], Tensor):  # what compiled and captured optimizers read in place
                    group["lr"].fill_(learning_rate)
                else:
                    group["lr"] = learning_rate

    def _check_run(self, state: State, total_epochs: float) -> None:
        if self.warmup_epochs > total_epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, longer than the run of {total_epochs:g} epochs; shorten it"
            )
        if state.schedulers:
            names = ", ".join(type(scheduler).__name__ for scheduler in state.schedulers)
            raise ValueError(
                f"the Trainer has a scheduler ({names}) beside LearningRate, which sets every step's rate and would "
                "overwrite the scheduler's; leave one of them out"
            )


def run_length(state: State) -> tuple[int, str]:
    """Length of the run and its unit: "ep", epochs, or "ba", batches. Raises ValueError for a length in other units."""
    duration = state.max_duration
    unit = "" if duration is None else str(duration.unit.value)
    if duration is None or unit not in ("ep", "ba"):
        raise ValueError(
            f"the run's length is {duration}; give it in epochs or in batches (for example max_duration='90ep')"
        )
    return duration.value, unit


def run_length_epochs(state: State) -> float:
    """Length of the run in epochs; one in batches is divided by the batches per epoch.

    Raises ValueError for a length in other units, and for one in batches if the loader's length is unknown.
    """
    length, unit = run_length(state)
    if unit == "ep":
        return float(length)
    if state.dataloader_len is None:
        raise ValueError(
            f"the run's length is {length} batches, and the loader, a {type(state.dataloader).__name__}, does not tell "
            "how many an epoch has; give the length in epochs (for example max_duration='90ep')"
        )
    return length / state.dataloader_len.value


def run_epochs(state: State) -> int:
    """How many epochs the run starts; the last one may end early. Raises ValueError as `run_length_epochs`."""
    return math.ceil(run_length_epochs(state))


def epochs_done(state: State) -> float:
    """Epochs completed before the next step, including the part of the current one."""
    in_epoch = state.timestamp.batch_in_epoch.value
    if in_epoch == 0:
        return float(state.timestamp.epoch.value)
    assert state.dataloader_len is not None, "a loader of unknown length has no share of an epoch"
    return state.timestamp.epoch.value + in_epoch / state.dataloader_len.value


def require_schedule(state: State, asked_by: str) -> None:
    """Refuse a run in which an algorithm changes the learning rate but nothing applies it.

    Raises ValueError naming `asked_by`, the setting that needs a `LearningRate` among the run's algorithms.
    """
    if not any(isinstance(algorithm, LearningRate) for algorithm in state.algorithms):
        raise ValueError(
            f"{asked_by} changes the learning rate, and no algos.LearningRate is among the Trainer's algorithms to "
            "apply it: add one (decay='constant' keeps the rate as it is elsewhere)"
        )


def _interpolate(epoch: float, points: Sequence[tuple[float, float]]) -> float:
    before = [point for point in points if point[0] <= epoch]
    after = [point for point in points if point[0] > epoch]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (start, low), (end, high) = before[-1], after[0]
    return low + (high - low) * (epoch - start) / (end - start)


def _check_points(points: Sequence[tuple[float, float]], *, decay: Decay, warmup_epochs: float) -> None:
    given = [list(point) for point in points]
    if not all(len(point) == 2 and all(isinstance(value, (int, float)) for value in point) for point in given):
        raise ValueError(f"points {given} must be pairs of numbers, an epoch and a factor: [[0, 0.1], [5, 1], [90, 0]]")
    if (decay == "piecewise_linear") != bool(given):
        raise ValueError(
            f"points is {given} and decay is {decay}; decay: piecewise_linear needs them, as "
            "[[epoch, factor], ...], and no other reads them"
        )
    if any(before[0] >= after[0] for before, after in pairwise(points)):
        raise ValueError(f"points {given} must be in rising order of their epochs, no two the same")
    if any(epoch < 0 or not 0 <= factor < math.inf for epoch, factor in points):
        raise ValueError(f"points {given} are pairs of an epoch and a factor on the learning rate, neither below 0")
    if given and warmup_epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs:g} beside points, which say the warm-up themselves; drop it")


def _check_decay(decay: str) -> None:
    if decay not in get_args(Decay):
        raise ValueError(f"decay {decay!r} must be one of {', '.join(get_args(Decay))}")
