"""Pictures of a judgement, as PNG files: confusion, calibration, mistakes, accuracy against image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.judging.predicting import Mistake
from training.results.figures import EVAL_COLOR, TEXT_COLOR, TRAIN_COLOR, new_figure, save_png, style_axes

_NAMED_CLASSES = 40  # beyond, names are too small to read beside a matrix
_NUMBERED_CLASSES = 25
_MOST_CELLS = 125  # on a side of the matrix; a cell of fewer than four pixels is not seen
_GRID_COLUMNS = 5
_SMALLEST_SHOWN_PX = 96  # smaller images are magnified without smoothing
_LONGEST_NAME = 22


def draw_confusion(
    confusion: np.ndarray, names: Sequence[str], confused: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """The matrix as shares of each true class, and the pairs that are mistaken most often.

    confusion: counts [C, C], a row for each true class. With many classes the names stand only beside the pairs, and a
        cell is the sum over several neighboring classes.
    """
    pooled = -(-len(names) // _MOST_CELLS)
    shares = _pooled(confusion, pooled)
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1)
    figure = new_figure(width_inches=13, height_inches=6.6)
    matrix, pairs = figure.subplots(1, 2, width_ratios=(1.15, 1))
    of = "each true class (row)" if pooled == 1 else f"each {pooled} true classes (row)"
    style_axes(matrix, title=f"Share of {of} by prediction", x_label="predicted", y_label="true")
    matrix.grid(visible=False)
    # The square root shows a mistake of one in a thousand; a thousand classes have no room for its number.
    edge = len(shares) * pooled - 0.5  # the axes count classes, whatever a cell holds
    shown = matrix.imshow(
        np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(-0.5, edge, edge, -0.5)
    )
    bar = figure.colorbar(shown, ax=matrix, fraction=0.046)
    ticks = np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_ticks(list(np.sqrt(ticks)), labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    if len(names) <= _NAMED_CLASSES:
        places = range(len(names))
        matrix.set_xticks(
            places, [_short(name) for name in names], rotation=90 if _are_long(names) else 0, fontsize=7.5
        )
        matrix.set_yticks(places, [_short(name) for name in names], fontsize=7.5)
    if len(names) <= _NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[row, column] > 0.4 else TEXT_COLOR
                matrix.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=color)
    _draw_pairs(pairs, confused)
    save_png(figure, path)


def _pooled(confusion: np.ndarray, size: int) -> np.ndarray:
    """Sums over blocks of `size` by `size`; the last row and column of blocks may be smaller."""
    starts = np.arange(0, len(confusion), size)
    return np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1)


def draw_calibration(bins: Sequence[Mapping[str, float]], error: float, path: Path) -> None:
    """Accuracy against confidence, and how many images each bin holds. bins: of `metrics.reliability`."""
    figure = new_figure(width_inches=6.4, height_inches=5.6)
    curve, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    style_axes(curve, title=f"Calibration (expected error {100 * error:.2f} %)", y_label="accuracy (%)")
    curve.plot([0, 100], [0, 100], color=TRAIN_COLOR, linewidth=1.2, linestyle=(0, (4, 3)), label="as sure as right")
    confidence = [100 * one["confidence"] for one in bins]
    curve.plot(confidence, [100 * one["accuracy"] for one in bins], color=EVAL_COLOR, marker="o", markersize=4,
               label="this network")  # fmt: skip
    curve.legend(frameon=False, fontsize=8.5, labelcolor=TEXT_COLOR)
    style_axes(counts, x_label="confidence (%)", y_label="images")
    counts.bar(confidence, [one["images"] for one in bins], width=4, color=TRAIN_COLOR)
    counts.set_yscale("log")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    counts.yaxis.set_minor_formatter("")
    counts.set_xlim(0, 100)
    save_png(figure, path)


def draw_mistakes(mistakes: Sequence[Mistake], names: Sequence[str], path: Path) -> None:
    """The most confident mistakes as the network saw them, the most confident first."""
    rows = max(1, -(-len(mistakes) // _GRID_COLUMNS))
    figure = new_figure(width_inches=11, height_inches=0.7 + 2.5 * rows)
    figure.suptitle("Most confident mistakes: true → predicted", fontsize=11, color=TEXT_COLOR, x=0.01, ha="left")
    for place, axes in enumerate(figure.subplots(rows, _GRID_COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(mistakes):
            one = mistakes[place]
            smooth = "nearest" if one.pixels.shape[0] < _SMALLEST_SHOWN_PX else "antialiased"
            axes.imshow(one.pixels, interpolation=smooth)
            said = f"{_short(names[one.label])} → {_short(names[one.predicted])}"
            said += f"\n{100 * one.confidence:.1f} %, image {one.index}"
            axes.set_title(said, fontsize=8.5, color=TEXT_COLOR)
    if not mistakes:
        figure.text(0.5, 0.4, "no mistakes", ha="center", fontsize=12, color=TEXT_COLOR)
    save_png(figure, path)


def draw_sizes(sizes: Sequence[Mapping[str, Any]], image_size: int, path: Path) -> None:
    """Top-1 against the size of the test images. image_size: the recipe's own, in px."""
    figure = new_figure(width_inches=6.4, height_inches=4)
    axes = figure.add_subplot()
    style_axes(axes, title="Top-1 against test image size", x_label="image size (px)", y_label="top-1 (%)")
    values = [100 * one["top1"] for one in sizes]
    axes.plot([one["image_size"] for one in sizes], values, color=EVAL_COLOR, marker="o", markersize=4)
    for one, value in zip(sizes, values, strict=True):
        place = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
        axes.annotate(f"{value:.2f}", (one["image_size"], value), fontsize=8, color=TEXT_COLOR, **place)
    axes.axvline(
        image_size, color=TRAIN_COLOR, linewidth=1, linestyle=(0, (4, 3)), label=f"the recipe's {image_size} px"
    )
    axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT_COLOR)
    axes.margins(x=0.1, y=0.25)
    save_png(figure, path)


def _draw_pairs(axes: Any, confused: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, title="Mistaken most often (true → predicted)", x_label="images")
    axes.grid(visible=False, axis="y")
    if not confused:
        axes.text(0.5, 0.5, "no mistakes", transform=axes.transAxes, ha="center", color=TEXT_COLOR)
        return
    places = np.arange(len(confused))
    axes.barh(places, [one["images"] for one in confused], color=EVAL_COLOR, height=0.6)
    names = [f"{_short(one['class'])} → {_short(one['predicted'])}" for one in confused]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _are_long(names: Sequence[str]) -> bool:
    return max(map(len, names)) > 3
