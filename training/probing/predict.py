"""From what was measured to the time of a whole run. Arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.probing.phases import Phase

_STARVED_SHARE = 0.1  # a step that takes this much longer than without the loader waits for it
_BUSY_SHARE = 0.5


@dataclass(frozen=True)
class Span:
    """Seconds: the mean, and the range if the machine stays as fast, or as slow, as in a quarter of the measurement."""

    mean: float
    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.mean + other.mean, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Span:
        """This, `factor` times over."""
        return Span(self.mean * factor, self.low * factor, self.high * factor)


NOTHING = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class PhasePrediction:
    """A phase of the run. step: of one. between: everything else of one epoch, without evaluation and checkpoint.

    measured: whether it was, or lies on the line between measured phases.
    """

    phase: Phase
    step: Span
    between: Span
    measured: bool

    @property
    def total(self) -> Span:
        """All epochs of the phase."""
        return (self.step.times(self.phase.steps) + self.between).times(self.phase.epochs)

    @property
    def images_per_second(self) -> float:
        """Images of all ranks."""
        return self.phase.images / (self.step.mean * self.phase.steps)


@dataclass(frozen=True)
class Prediction:
    """A run. evaluation, checkpoint: of one."""

    phases: tuple[PhasePrediction, ...]
    evaluation: Span
    evaluations: int
    checkpoint: Span
    checkpoints: int

    @property
    def total(self) -> Span:
        """The whole run, from its first epoch on."""
        parts = [one.total for one in self.phases]
        parts += [self.evaluation.times(self.evaluations), self.checkpoint.times(self.checkpoints)]
        return sum(parts, NOTHING)


def span_of(values: Sequence[float]) -> Span:
    """The mean, and the quartiles as the range; the mean lies within it."""
    if not values:
        return NOTHING
    mean = statistics.mean(values)
    if len(values) == 1:
        return Span(mean, mean, mean)
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Span(mean, min(mean, quartiles[0]), max(mean, quartiles[2]))


def predict(
    phases: Sequence[Phase],
    steps: Mapping[int, Sequence[float]],
    between_epochs: Mapping[int, Sequence[float]],
    *,
    evaluations: Sequence[float],
    checkpoints: Sequence[float],
    evaluation_count: int,
    checkpoint_count: int,
    communication_seconds: float = 0.0,
) -> Prediction:
    """The run of `phases`; `steps` and `between_epochs` hold the measurements, in seconds, of some of them.

    A phase that was not measured lies on the line, over multiply-adds of a step, between the nearest that were.
    communication_seconds: added to each step; the low end of the range takes it as hidden behind the backward pass.
    """
    measured = {index: span_of(values) for index, values in steps.items()}
    between = {index: span_of(values) for index, values in between_epochs.items()}
    sent = Span(communication_seconds, 0.0, communication_seconds)
    made = [
        PhasePrediction(
            phase=phase,
            step=_between(phases, measured, index) + sent,
            between=_between(phases, between, index),
            measured=index in measured,
        )
        for index, phase in enumerate(phases)
    ]
    return Prediction(tuple(made), span_of(evaluations), evaluation_count, span_of(checkpoints), checkpoint_count)


def bottleneck(*, step: float, cached: float, loader: float, busy_share: float | None = None) -> str:
    """What a step waits for: loader, host or device.

    step: as in training. cached: with its batch in memory. loader: a batch from the loader alone. busy_share: of a step
    that the GPU computes; None if unknown, as on CPUs, where host and device are one.
    """
    if step > (1 + _STARVED_SHARE) * cached and loader > _BUSY_SHARE * cached:
        return "loader"
    if busy_share is not None and busy_share < _BUSY_SHARE:
        return "host"
    return "device"


def due_count(epochs: int, *, every: int) -> int:
    """How often something happens that is due at every `every`-th epoch, and at the last."""
    return epochs // every + (1 if epochs % every else 0)


def _between(phases: Sequence[Phase], known: Mapping[int, Span], index: int) -> Span:
    if index in known:
        return known[index]
    ordered = sorted(known, key=lambda one: phases[one].macs)
    cost = phases[index].macs
    below = [one for one in ordered if phases[one].macs <= cost]
    above = [one for one in ordered if phases[one].macs > cost]
    if not below or not above:
        return known[below[-1] if below else above[0]]
    first, last = phases[below[-1]].macs, phases[above[0]].macs
    share = (cost - first) / (last - first)
    return known[below[-1]].times(1 - share) + known[above[0]].times(share)
