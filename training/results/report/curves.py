"""The charts and tables that several runs' histories give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from training.results.figures import Series, step_positions
from training.results.history import History, number_or_nan
from training.results.report.charts import Chart, Line

_MOST_PHASES = 12  # with more, as when the size grows every epoch, the table of phases would be one of epochs


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs with the same image size and batch size."""

    first_epoch: int
    last_epoch: int
    image_size: int | None
    global_batch_size: int | None
    learning_rates: tuple[float, float] | None
    train_seconds: float | None
    images_per_second: float | None
    eval_top1: float | None


@dataclass(frozen=True)
class Part:
    """A part of a run's wall time."""

    name: str
    seconds: float


def result_charts(histories: Sequence[History]) -> list[Chart]:
    """Top-1, loss, and top-1 against training time."""
    over_time = [
        _line(
            Series(history, "eval_top1", scale=100, x=np.nancumsum(history.column("train_seconds"))),
            histories,
            run=run,
            what="evaluation",
            alone="eval",
        )
        for run, history in enumerate(histories)
    ]
    return [
        Chart("top1", "Top-1 accuracy", "%", _both(histories, "top1", scale=100), _percent),
        Chart("loss", "Loss", "nats", _both(histories, "loss"), lambda value: f"{value:.3f}", from_zero=True),
        Chart("over-time", "Top-1 against training time", "%", over_time, _percent, "training time (s)"),
    ]


def phase_charts(histories: Sequence[History]) -> list[Chart]:
    """Learning rate, image size and batch size by epoch."""
    rates = []
    for run, history in enumerate(histories):
        steps = np.array([number_or_nan(value) for value in history.steps["learning_rate"]])
        positions = step_positions(history)
        if not len(steps):  # without metrics.npz: the last rate of each epoch
            positions, steps = history.column("epoch"), history.column("learning_rate")
        letter = run_letter(run) if len(histories) > 1 else ""
        rates.append(Line(positions, steps, run, f"{letter} learning rate".strip(), letter))
    rate = Chart("learning-rate", "Learning rate", "of each step", rates, lambda value: f"{value:.2g}", from_zero=True)
    return [
        rate,
        _by_epoch(histories, "image_size", "Image size", "px", lambda v: f"{v:.0f} px", stairs=True),
        _by_epoch(histories, "global_batch_size", "Batch size", "images per step", lambda v: f"{v:,.0f}", stairs=True),
    ]


def time_charts(histories: Sequence[History]) -> list[Chart]:
    """Throughput and seconds by epoch, and the share of time that training waited for data if it was measured."""
    charts = [
        _by_epoch(histories, "images_per_second", "Throughput", "images/s", lambda v: f"{v:,.0f}"),
        _by_epoch(histories, "train_seconds", "Training time per epoch", "seconds", lambda v: f"{v:,.2f} s"),
    ]
    if any(np.isfinite(history.column("data_wait_share")).any() for history in histories):
        title, unit = "Waiting for data", "% of training time"
        charts.append(_by_epoch(histories, "data_wait_share", title, unit, lambda v: f"{v:.1f} %", scale=100))
    return charts


def phases_of(history: History) -> list[Phase]:
    """The phases of a run, in order; none if there are too many for a table."""
    groups = groupby(history.epochs, key=lambda row: (row.get("image_size"), row.get("global_batch_size")))
    phases = [_phase(list(rows)) for _, rows in groups]
    return phases if len(phases) <= _MOST_PHASES else []


def time_parts(history: History, *, seconds: float | None, resumed: bool) -> list[Part]:
    """What a run's time went into: training by phase, waiting for data if it was measured, and the rest.

    seconds: wall time of the run. That of a resumed run covers its last session only, so the rest is unknown.
    """
    phases = phases_of(history)
    waits = history.column("train_seconds") * history.column("data_wait_share")
    waiting = float(np.nansum(waits))
    training = float(np.nansum(history.column("train_seconds")))
    if waiting > 0 or len(phases) < 2:
        parts = [Part("training", training - waiting)]
    else:
        parts = [Part(f"training, {_epochs(phase)}", phase.train_seconds or 0.0) for phase in phases]
    if waiting > 0:
        parts.append(Part("training, waiting for data", waiting))
    if seconds is not None and not resumed and seconds > training:
        parts.append(Part("start, evaluation, checkpoints", seconds - training))
    return [part for part in parts if part.seconds > 0]


def _epochs(phase: Phase) -> str:
    first, last = phase.first_epoch, phase.last_epoch
    size = "" if phase.image_size is None else f" at {phase.image_size} px"
    return (f"epoch {first}" if first == last else f"epochs {first}–{last}") + size


def _phase(rows: list[dict[str, Any]]) -> Phase:
    history = History(rows)
    rates, seconds, speeds = (history.column(name) for name in ("learning_rate", "train_seconds", "images_per_second"))
    known = np.isfinite(seconds) & np.isfinite(speeds) & (seconds > 0)
    measured = [row["eval_top1"] for row in rows if row.get("eval_top1") is not None]
    return Phase(
        first_epoch=rows[0]["epoch"],
        last_epoch=rows[-1]["epoch"],
        image_size=rows[0].get("image_size"),
        global_batch_size=rows[0].get("global_batch_size"),
        learning_rates=(float(rates[0]), float(rates[-1])) if np.isfinite(rates[[0, -1]]).all() else None,
        train_seconds=float(np.nansum(seconds)) if np.isfinite(seconds).any() else None,
        images_per_second=float((seconds * speeds)[known].sum() / seconds[known].sum()) if known.any() else None,
        eval_top1=float(measured[-1]) if measured else None,
    )


def _by_epoch(
    histories: Sequence[History],
    column: str,
    title: str,
    unit: str,
    show: Callable[[float], str],
    *,
    stairs: bool = False,
    scale: float = 1,
) -> Chart:
    lines = [
        _line(Series(history, column, scale=scale), histories, run=run, what=title.lower())
        for run, history in enumerate(histories)
    ]
    name = column.replace("_", "-")
    return Chart(name, title, unit, lines, show, from_zero=True, stairs=stairs)


def _both(histories: Sequence[History], column: str, *, scale: float = 1) -> list[Line]:
    """Training (faint) and evaluation of each run; of several runs only the evaluation has a label."""
    lines = []
    for run, history in enumerate(histories):
        for prefix, what in (("train", "training"), ("eval", "evaluation")):
            series = Series(history, f"{prefix}_{column}", scale=scale)
            lines.append(_line(series, histories, run=run, what=what, alone=prefix, faint=prefix == "train"))
    return lines


def _line(
    series: Series, histories: Sequence[History], *, run: int, what: str, alone: str = "", faint: bool = False
) -> Line:
    """A run's line, under the run's letter if there are several; the label `alone` is that of a single run."""
    if len(histories) == 1:
        return Line(series.x, series.y, run, what, alone, faint)
    letter = run_letter(run)
    return Line(series.x, series.y, run, f"{letter} {what}", None if faint else letter, faint)


def run_letter(run: int) -> str:
    """What a run is called in the charts: A, B, C ..."""
    return chr(ord("A") + run)


def _percent(value: float) -> str:
    return f"{value:.2f} %"
