"""Plots of a run and of a comparison, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.whole_files import replace_file
from training.results.history import History, number_or_nan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TRAIN_COLOR, EVAL_COLOR, _SPEED_COLOR = "#8aa4c8", "#c2410c", "#3f7d58"
TEXT_COLOR, _GRID_COLOR, _BOUNDARY_COLOR = "#333333", "#e9e9e9", "#a0a0a0"
_HEADROOM = 1.3  # room for the legend above the curves of the last panel
_MOST_MARKERS = 40  # a curve of more points is drawn without markers
_LEGEND_STYLE: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": TEXT_COLOR, "loc": "best"}


def plot_curves(history: History, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw loss, top-1, learning rate, and image size with throughput over the epochs of a run, as one PNG.

    Faint vertical lines mark changes of the image size.
    """
    figure = new_figure(width_inches=11, height_inches=7)
    if title:
        figure.suptitle(title, fontsize=12, color=TEXT_COLOR, x=0.01, ha="left")
    panels = figure.subplots(2, 2, sharex=True)
    _plot_loss(panels[0, 0], history)
    _plot_top1(panels[0, 1], history)
    _plot_learning_rate(panels[1, 0], history)
    _plot_size_and_speed(panels[1, 1], history)
    last_epoch = max([1.0, *history.column("epoch"), *step_positions(history)[-1:]])
    for axes in panels.flat:
        axes.set_xlim(0, last_epoch * 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for boundary in _stage_boundaries(history):
            axes.axvline(boundary, color=_BOUNDARY_COLOR, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.6)
    save_png(figure, Path(path))


def plot_comparison(histories: Mapping[str, History], path: str | os.PathLike[str]) -> None:
    """Draw the evaluated top-1 of two runs against their seconds of training, as one PNG. histories: label -> run."""
    figure = new_figure(width_inches=7.2, height_inches=4.4)
    axes = figure.add_subplot()
    style_axes(axes, title="Top-1 against training time", x_label="training time (s)", y_label="evaluated top-1 (%)")
    for (label, history), color in zip(histories.items(), (EVAL_COLOR, TRAIN_COLOR), strict=True):
        series = Series(history, "eval_top1", scale=100, x=np.nancumsum(history.column("train_seconds")))
        _draw(axes, series, color=color, label=label, show=lambda value: f"{value:.2f} %")
    axes.set_xlim(left=0)
    _add_legend(axes)
    save_png(figure, Path(path))


def _plot_loss(axes: Axes, history: History) -> None:
    style_axes(axes, title="Loss", y_label="loss (nats)")
    for name, label, color in (("train_loss", "training", TRAIN_COLOR), ("eval_loss", "evaluation", EVAL_COLOR)):
        _draw(axes, Series(history, name), color=color, label=label, show=lambda value: f"{value:.3f}")
    _add_legend(axes)


def _plot_top1(axes: Axes, history: History) -> None:
    style_axes(axes, title="Top-1 accuracy", y_label="top-1 (%)")
    for name, label, color in (("train_top1", "training", TRAIN_COLOR), ("eval_top1", "evaluation", EVAL_COLOR)):
        series = Series(history, name, scale=100)
        _draw(axes, series, color=color, label=label, show=lambda value: f"{value:.2f} %")
    _add_legend(axes)


def _plot_learning_rate(axes: Axes, history: History) -> None:
    style_axes(axes, title="Learning rate", x_label="epoch", y_label="learning rate of each step")
    rates = np.array([number_or_nan(value) for value in history.steps["learning_rate"]])
    positions = step_positions(history)
    marker = "o" if len(rates) == 1 else None
    axes.plot(positions, rates, color=TEXT_COLOR, linewidth=1.4, marker=marker, markersize=3)
    axes.set_ylim(bottom=0)


def _plot_size_and_speed(axes: Axes, history: History) -> None:
    style_axes(axes, title="Image size and throughput", x_label="epoch", y_label="image size (px)")
    epochs, sizes, rates = (history.column(name) for name in ("epoch", "image_size", "images_per_second"))
    if np.isfinite(sizes).any():  # each size holds for its whole epoch, from epoch - 1 to epoch
        edges = np.concatenate([epochs[:1] - 1, epochs])
        axes.stairs(sizes, edges, baseline=None, color=TEXT_COLOR, linewidth=1.6, label="image size")
        axes.set_ylim(0, _HEADROOM * float(np.nanmax(sizes)))
    speed = axes.twinx()
    style_axes(speed, y_label="training images/s")
    speed.grid(visible=False)
    speed.spines["right"].set_visible(True)
    speed.yaxis.label.set_color(_SPEED_COLOR)
    if np.isfinite(rates).any():
        series = Series(history, "images_per_second")
        _draw(speed, series, color=_SPEED_COLOR, label="images/s", show=lambda value: f"{value:,.0f}")
        speed.set_ylim(0, _HEADROOM * float(np.nanmax(rates)))
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    handles = [*axes.get_legend_handles_labels()[0], *speed.get_legend_handles_labels()[0]]
    if handles:
        speed.legend(handles=handles, **{**_LEGEND_STYLE, "loc": "upper center", "ncols": 2})


class Series:
    """The measured points of an epoch column. An epoch that was not measured is left out, so that evaluating every
    fifth epoch still gives a line; a measurement of NaN stays and breaks the line."""

    def __init__(self, history: History, name: str, *, scale: float = 1, x: np.ndarray | None = None) -> None:
        measured = np.array([row.get(name) is not None for row in history.epochs], dtype=bool)
        self.x = (history.column("epoch") if x is None else x)[measured]
        self.y = scale * history.column(name)[measured]


def _draw(axes: Axes, series: Series, *, color: str, label: str, show: Callable[[float], str]) -> None:
    """Draw one series, with its last value in the legend. Draws nothing if nothing was measured."""
    if not len(series.y):
        return
    marker = "o" if len(series.y) <= _MOST_MARKERS else None
    label = f"{label} (last {show(series.y[-1])})"
    axes.plot(series.x, series.y, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)


def step_positions(history: History) -> np.ndarray:
    """Position of each step on the epoch axis [S]: the first step of epoch 3 is at 2.0."""
    epochs = np.array(history.steps["epoch"], dtype=np.int64)
    if not len(epochs):
        return np.zeros(0)
    numbers, starts, counts = np.unique(epochs, return_index=True, return_counts=True)
    if len(history.epochs) < numbers[-1] and len(counts) > 1:  # an unfinished epoch is as long as the one before it
        counts = np.append(counts[:-1], max(counts[-1], counts[-2]))
    which = np.searchsorted(numbers, epochs)
    return epochs - 1 + (np.arange(len(epochs)) - starts[which]) / counts[which]


def _stage_boundaries(history: History) -> list[float]:
    """Ends of the epochs after which the image size changes."""
    rows = history.epochs
    return [
        float(rows[i]["epoch"])
        for i in range(len(rows) - 1)
        if rows[i].get("image_size") is not None and rows[i].get("image_size") != rows[i + 1].get("image_size")
    ]


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND_STYLE)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_BOUNDARY_COLOR)


def style_axes(axes: Axes, *, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """The look that all pictures share: quiet axes, titles at the left."""
    axes.set_title(title, fontsize=10.5, color=TEXT_COLOR, loc="left")
    axes.set_xlabel(x_label, fontsize=9, color=TEXT_COLOR)
    axes.set_ylabel(y_label, fontsize=9, color=TEXT_COLOR)
    axes.tick_params(labelsize=8.5, colors=TEXT_COLOR, length=3, color=_BOUNDARY_COLOR)
    axes.grid(visible=True, color=_GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_BOUNDARY_COLOR)


def new_figure(*, width_inches: float, height_inches: float) -> Figure:
    """An empty figure on white."""
    # Without pyplot, which would choose a backend for the whole process and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, whole or not at all."""
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))
