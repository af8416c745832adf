"""What a run leaves behind: metrics.csv, metrics.npz, curves.png, summary.json, and the comparison of two runs.

Nothing here needs Composer: any loop that can fill a `History` gets the same files. Every file is written beside its
place and moved there, so a reader (or a killed run) never meets half of one.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "EPOCH_COLUMNS",
    "STEP_COLUMNS",
    "History",
    "format_comparison",
    "format_seconds",
    "format_summary",
    "plot_curves",
    "read_metrics",
    "summarize",
    "write_comparison",
    "write_epochs_csv",
    "write_json",
    "write_metrics",
]

# One row of metrics.csv. Top-1 is a fraction, the image size the side in px; images and seconds are those of training.
EPOCH_COLUMNS = (
    "epoch",
    "train_loss",
    "train_top1",
    "eval_loss",
    "eval_top1",
    "learning_rate",
    "image_size",
    "global_batch_size",
    "images_per_second",
    "train_seconds",
)
STEP_COLUMNS = ("step", "epoch", "loss", "learning_rate")
_WHOLE_NUMBERS = ("epoch", "image_size", "global_batch_size")

_DISTRIBUTIONS = {
    "torch": "torch",
    "composer": "mosaicml",
    "ffcv": "ffcv",
    "numpy": "numpy",
    "torchvision": "torchvision",
    "brisk-vision": "brisk-vision",
}


@dataclass(frozen=True)
class History:
    """The course of a run.

    epochs: one dict a finished epoch with the keys of `EPOCH_COLUMNS`; None where a value was not measured.
    steps: lists of equal length under the names of `STEP_COLUMNS`; `step` and `epoch` count from 1.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in STEP_COLUMNS})

    def column(self, name: str) -> np.ndarray:
        """One value an epoch as float64 [E], NaN where it was not measured."""
        return np.array([_number(row.get(name)) for row in self.epochs], dtype=np.float64)


def write_metrics(history: History, folder: str | os.PathLike[str]) -> None:
    """Write metrics.csv (one row an epoch) and metrics.npz to `folder`.

    metrics.npz holds the epoch columns under their own names and `step`, `step_epoch`, `step_loss` and
    `step_learning_rate`; missing values are NaN, and no array needs `allow_pickle`.
    """
    folder = Path(folder)
    write_epochs_csv(history, folder / "metrics.csv")
    arrays = {name: history.column(name) for name in EPOCH_COLUMNS}
    arrays["epoch"] = arrays["epoch"].astype(np.int64)
    for name in STEP_COLUMNS:
        whole = name in ("step", "epoch")
        values = [value if whole else _number(value) for value in history.steps[name]]
        arrays["step" if name == "step" else f"step_{name}"] = np.array(values, dtype=np.int64 if whole else np.float64)

    def write(file: BinaryIO) -> None:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  (numpy's stub takes the arrays for allow_pickle)

    _replace_file(folder / "metrics.npz", write)


def write_epochs_csv(history: History, path: str | os.PathLike[str]) -> None:
    """Write one line an epoch under a header of `EPOCH_COLUMNS`; a value that was not measured is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EPOCH_COLUMNS)
    writer.writerows([row.get(name) for name in EPOCH_COLUMNS] for row in history.epochs)
    _replace_file(Path(path), lambda file: file.write(text.getvalue().encode()))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The epochs of a metrics.csv, as in `History.epochs`."""
    with open(path, newline="") as file:
        return [{name: _parse(name, value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_json(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `data` as strict JSON: numbers that JSON has no form for (NaN, infinity) become null."""
    text = json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"
    _replace_file(Path(path), lambda file: file.write(text.encode()))


def summarize(
    history: History,
    *,
    run_name: str,
    seconds: float,
    parameters: int,
    seed: int | None,
    algorithms: Mapping[str, Any],
    world_size: int = 1,
    resumed: bool = False,
    forward_macs: float | None = None,
) -> dict[str, Any]:
    """What summary.json says of a run.

    top1 and loss are those of the last evaluation, best_top1 is the highest of all. A run that is judged on a test
    split adds `test`: the checkpoint's name, its top1 and its loss there. `seconds` is the wall time of the
    whole run as the caller measured it; train_seconds is that of training alone, over all sessions of a resumed run.

    parameters: number of scalars in the model's parameters.
    algorithms: name -> settings of every algorithm that acted.
    forward_macs: multiply-adds of all the run's training forward passes, where known.
    """
    top1 = history.column("eval_top1")
    measured_top1 = top1[np.isfinite(top1)]
    return {
        "run_name": run_name,
        "top1": _last_measured(history, "eval_top1"),
        "best_top1": float(measured_top1.max()) if measured_top1.size else None,
        "loss": _last_measured(history, "eval_loss"),
        "epochs": len(history.epochs),
        "seconds": seconds,
        "train_seconds": float(np.nansum(history.column("train_seconds"))),
        "images_per_second": _mean_images_per_second(history),
        "forward_macs": forward_macs,
        "parameters": parameters,
        "seed": seed,
        "world_size": world_size,
        "resumed": resumed,
        "algorithms": dict(algorithms),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as aligned lines for the terminal."""
    hardware = summary.get("hardware") or {}
    gpus = hardware.get("gpus") or {}
    device = ", ".join(f"{count} × {name}" for name, count in gpus.items()) or hardware.get("cpu") or "unknown"
    processes = summary.get("world_size") or 1
    epochs = f"{summary['epochs']}" + (" (resumed)" if summary.get("resumed") else "")
    lines = [
        ("run", summary["run_name"]),
        ("top-1", f"{_format_top1(summary['top1'])} (best {_format_top1(summary['best_top1'])})"),
        ("loss", _format_loss(summary["loss"])),
        *([("test", _format_test(summary["test"]))] if summary.get("test") else []),
        ("epochs", epochs),
        ("time", _format_times(summary)),
        ("throughput", _format_rate(summary["images_per_second"])),
        ("parameters", f"{summary['parameters']:,}"),
        ("algorithms", ", ".join(summary["algorithms"]) or "none"),
        ("seed", str(summary["seed"])),
        ("hardware", f"{device}, {processes} {'process' if processes == 1 else 'processes'}"),
    ]
    return _align(lines)


def _format_test(test: Mapping[str, Any]) -> str:
    return f"top-1 {_format_top1(test['top1'])}, loss {_format_loss(test['loss'])} ({test['checkpoint']}, test split)"


def format_comparison(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Two summaries side by side under their labels, and one sentence on which is ahead in what.

    Raises:
        ValueError: there are not exactly two.
    """
    _check_pair(summaries, "summaries")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("top-1", "top1", _format_top1),
        ("best top-1", "best_top1", _format_top1),
        ("loss", "loss", _format_loss),
        ("epochs", "epochs", str),
        ("training time", "train_seconds", _format_exact_seconds),
        ("total time", "seconds", _format_exact_seconds),
        ("throughput", "images_per_second", _format_rate),
        ("forward MACs", "forward_macs", _format_macs),
    ]
    # A resumed run's total time is that of its last session: nothing to compare.
    summaries = {k: {**v, "seconds": None} if v.get("resumed") else v for k, v in summaries.items()}
    table = [["", *summaries]]
    for title, key, show in rows:
        if any(summary.get(key) is not None for summary in summaries.values()):
            table.append([title, *(show(summary.get(key)) for summary in summaries.values())])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    return "\n".join([*lines, "", _verdict(summaries)])


def write_comparison(
    histories: Mapping[str, History], summaries: Mapping[str, Mapping[str, Any]], folder: str | os.PathLike[str]
) -> None:
    """Write compare.png (evaluated top-1 against seconds of training) and compare.json to `folder`.

    Raises:
        ValueError: `histories` and `summaries` do not name the same two runs.
    """
    _check_pair(summaries, "summaries")
    if set(histories) != set(summaries):
        raise ValueError(
            f"histories of {sorted(histories)} were given with summaries of {sorted(summaries)}: "
            "both must name the same two runs"
        )
    folder = Path(folder)
    write_json({"runs": summaries, "verdict": _verdict(summaries)}, folder / "compare.json")

    figure = _new_figure(width_inches=7.2, height_inches=4.4)
    axes = figure.add_subplot()
    _style(axes, title="Top-1 against training time", x_label="training time (s)", y_label="evaluated top-1 (%)")
    for (label, history), color in zip(histories.items(), (_EVAL_COLOR, _TRAIN_COLOR), strict=True):
        series = _Series(history, "eval_top1", scale=100, x=np.nancumsum(history.column("train_seconds")))
        _draw(axes, series, color=color, label=label, show=lambda value: f"{value:.2f} %")
    axes.set_xlim(left=0)
    _add_legend(axes)
    _save_png(figure, folder / "compare.png")


def plot_curves(history: History, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw loss, top-1, learning rate, and image size with throughput over the epochs of a run, as one PNG.

    Faint vertical lines stand where the image size changes.
    """
    figure = _new_figure(width_inches=11, height_inches=7)
    if title:
        figure.suptitle(title, fontsize=12, color=_TEXT_COLOR, x=0.01, ha="left")
    panels = figure.subplots(2, 2, sharex=True)
    _plot_loss(panels[0, 0], history)
    _plot_top1(panels[0, 1], history)
    _plot_learning_rate(panels[1, 0], history)
    _plot_size_and_speed(panels[1, 1], history)
    last_epoch = max([1.0, *history.column("epoch"), *_step_positions(history)[-1:]])
    for axes in panels.flat:
        axes.set_xlim(0, last_epoch * 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for boundary in _stage_boundaries(history):
            axes.axvline(boundary, color=_BOUNDARY_COLOR, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.6)
    _save_png(figure, Path(path))


def format_seconds(seconds: float | None) -> str:
    """0:42, 12:05 or 3:07:41; `-:--` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# -- Numbers ----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _parse(name: str, value: str) -> Any:
    if value == "":
        return None
    return int(value) if name in _WHOLE_NUMBERS else float(value)


def _plain(value: Any) -> Any:
    """`value` in the types of JSON. What is none of numbers, text, lists and mappings is told by its text."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _last_measured(history: History, name: str) -> float | None:
    """The last epoch's value that is not missing. A value that came out as NaN counts: hiding it would flatter."""
    values = [row[name] for row in history.epochs if row.get(name) is not None]
    return float(values[-1]) if values else None


def _mean_images_per_second(history: History) -> float | None:
    seconds, rate = history.column("train_seconds"), history.column("images_per_second")
    measured = np.isfinite(seconds) & np.isfinite(rate) & (seconds > 0)
    if not measured.any():
        return None
    return float((seconds * rate)[measured].sum() / seconds[measured].sum())


# -- Text -------------------------------------------------------------------------------------------------------------


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _format_top1(value: float | None) -> str:
    return f"{100 * value:.2f} %" if value is not None and _known(value) else "n/a"


def _format_loss(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "n/a"


def _format_times(summary: Mapping[str, Any]) -> str:
    total, training = format_seconds(summary["seconds"]), format_seconds(summary.get("train_seconds"))
    if summary.get("resumed"):  # the first is of the last session, the second of all
        return f"{total} since it was resumed, {training} of training in all"
    return f"{total}, {training} of it training"


def _format_exact_seconds(value: float | None) -> str:
    return f"{value:,.1f} s" if value is not None and _known(value) else "n/a"


def _format_rate(value: float | None) -> str:
    return f"{value:,.0f} images/s" if value is not None and _known(value) else "n/a"


def _format_macs(value: float | None) -> str:
    if value is None or not _known(value):
        return "n/a"
    power = min(int(math.log10(value)) // 3, 6) if value >= 1000 else 0
    return f"{value / 1000**power:.3g} {['', 'K', 'M', 'G', 'T', 'P', 'E'][power]}".rstrip()


def _align(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def _check_pair(summaries: Mapping[str, Any], name: str) -> None:
    if len(summaries) != 2:
        raise ValueError(
            f"{name} of {len(summaries)} runs were given; a comparison takes exactly two, each under its label"
        )


def _verdict(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence: who is ahead in top-1 and who in training time, by how much. Differences that the table does not
    show at its precision are called equal."""
    (first, a), (second, b) = summaries.items()
    return f"{_top1_clause(first, a, second, b)}; {_seconds_clause(first, a, second, b)}."


def _top1_clause(first: str, a: Mapping[str, Any], second: str, b: Mapping[str, Any]) -> str:
    if not (_known(a.get("top1")) and _known(b.get("top1"))):
        return "Top-1 was not measured in both runs"
    x, y = round(100 * a["top1"], 2), round(100 * b["top1"], 2)
    if x == y:
        return f"Top-1 is equal ({x:.2f} %)"
    ahead, behind = (first, second) if x > y else (second, first)
    high, low = max(x, y), min(x, y)
    return f"'{ahead}' is ahead of '{behind}' in top-1 by {high - low:.2f} points ({high:.2f} % against {low:.2f} %)"


def _seconds_clause(first: str, a: Mapping[str, Any], second: str, b: Mapping[str, Any]) -> str:
    # Training time where it is known, because a resumed run knows the wall time of its last session only.
    has_training_time = _known(a.get("train_seconds")) and _known(b.get("train_seconds"))
    key = "train_seconds" if has_training_time else "seconds"
    what = "training time" if key == "train_seconds" else "total time"
    resumed = a.get("resumed") or b.get("resumed")
    if not (_known(a.get(key)) and _known(b.get(key))) or (resumed and not has_training_time):
        return "time was not measured in both runs"
    x, y = round(a[key], 1), round(b[key], 1)
    if x == y:
        return f"{what} is equal ({x:,.1f} s)"
    ahead, behind = (first, second) if x < y else (second, first)
    faster, slower = min(x, y), max(x, y)
    ratio = f", {slower / faster:.2f} times as fast" if faster > 0 else ""
    return (
        f"'{ahead}' is ahead of '{behind}' in {what} by {slower - faster:,.1f} s "
        f"({faster:,.1f} s against {slower:,.1f} s{ratio})"
    )


# -- Surroundings -----------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _hardware() -> dict[str, Any]:
    import torch

    gpus: dict[str, int] = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            gpus[name] = gpus.get(name, 0) + 1
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "gpu_count": sum(gpus.values()),
        "memory_gb": _memory_gb(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or None


def _memory_gb() -> float | None:
    try:
        size_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
    return round(size_bytes / 1e9, 1)


# -- Figures ----------------------------------------------------------------------------------------------------------

_TRAIN_COLOR, _EVAL_COLOR, _SPEED_COLOR = "#8aa4c8", "#c2410c", "#3f7d58"
_TEXT_COLOR, _GRID_COLOR, _BOUNDARY_COLOR = "#333333", "#e9e9e9", "#a0a0a0"
_HEADROOM = 1.3  # room for the legend above the curves of the last panel
_MOST_MARKERS = 40  # a curve of more points is drawn without markers


def _plot_loss(axes: Axes, history: History) -> None:
    _style(axes, title="Loss", y_label="loss (nats)")
    for name, label, color in (("train_loss", "training", _TRAIN_COLOR), ("eval_loss", "evaluation", _EVAL_COLOR)):
        _draw(axes, _Series(history, name), color=color, label=label, show=lambda value: f"{value:.3f}")
    _add_legend(axes)


def _plot_top1(axes: Axes, history: History) -> None:
    _style(axes, title="Top-1 accuracy", y_label="top-1 (%)")
    for name, label, color in (("train_top1", "training", _TRAIN_COLOR), ("eval_top1", "evaluation", _EVAL_COLOR)):
        series = _Series(history, name, scale=100)
        _draw(axes, series, color=color, label=label, show=lambda value: f"{value:.2f} %")
    _add_legend(axes)


def _plot_learning_rate(axes: Axes, history: History) -> None:
    _style(axes, title="Learning rate", x_label="epoch", y_label="learning rate of each step")
    rates = np.array([_number(value) for value in history.steps["learning_rate"]])
    positions = _step_positions(history)
    marker = "o" if len(rates) == 1 else None
    axes.plot(positions, rates, color=_TEXT_COLOR, linewidth=1.4, marker=marker, markersize=3)
    axes.set_ylim(bottom=0)


def _plot_size_and_speed(axes: Axes, history: History) -> None:
    _style(axes, title="Image size and throughput", x_label="epoch", y_label="image size (px)")
    epochs, sizes, rates = (history.column(name) for name in ("epoch", "image_size", "images_per_second"))
    if np.isfinite(sizes).any():  # each size holds for its whole epoch, from epoch - 1 to epoch
        edges = np.concatenate([epochs[:1] - 1, epochs])
        axes.stairs(sizes, edges, baseline=None, color=_TEXT_COLOR, linewidth=1.6, label="image size")
        axes.set_ylim(0, _HEADROOM * float(np.nanmax(sizes)))
    speed = axes.twinx()
    _style(speed, y_label="training images/s")
    speed.grid(visible=False)
    speed.spines["right"].set_visible(True)
    speed.yaxis.label.set_color(_SPEED_COLOR)
    if np.isfinite(rates).any():
        series = _Series(history, "images_per_second")
        _draw(speed, series, color=_SPEED_COLOR, label="images/s", show=lambda value: f"{value:,.0f}")
        speed.set_ylim(0, _HEADROOM * float(np.nanmax(rates)))
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    handles = [*axes.get_legend_handles_labels()[0], *speed.get_legend_handles_labels()[0]]
    if handles:
        speed.legend(handles=handles, **{**_LEGEND_STYLE, "loc": "upper center", "ncols": 2})


class _Series:
    """The measured points of an epoch column. An epoch that was not measured is left out, so that evaluating every
    fifth epoch still gives a line; a measurement that came out as NaN stays and breaks the line."""

    def __init__(self, history: History, name: str, *, scale: float = 1, x: np.ndarray | None = None) -> None:
        measured = np.array([row.get(name) is not None for row in history.epochs], dtype=bool)
        self.x = (history.column("epoch") if x is None else x)[measured]
        self.y = scale * history.column(name)[measured]


def _draw(axes: Axes, series: _Series, *, color: str, label: str, show: Callable[[float], str]) -> None:
    """Draw one series, its last value in the legend. Nothing measured: nothing drawn."""
    if not len(series.y):
        return
    marker = "o" if len(series.y) <= _MOST_MARKERS else None
    label = f"{label} (last {show(series.y[-1])})"
    axes.plot(series.x, series.y, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)


def _step_positions(history: History) -> np.ndarray:
    """Where on the epoch axis each step lies [S]: the first step of epoch 3 begins at 2.0."""
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


_LEGEND_STYLE: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": _TEXT_COLOR, "loc": "best"}


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND_STYLE)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_BOUNDARY_COLOR)


def _style(axes: Axes, *, title: str = "", x_label: str = "", y_label: str = "") -> None:
    axes.set_title(title, fontsize=10.5, color=_TEXT_COLOR, loc="left")
    axes.set_xlabel(x_label, fontsize=9, color=_TEXT_COLOR)
    axes.set_ylabel(y_label, fontsize=9, color=_TEXT_COLOR)
    axes.tick_params(labelsize=8.5, colors=_TEXT_COLOR, length=3, color=_BOUNDARY_COLOR)
    axes.grid(visible=True, color=_GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_BOUNDARY_COLOR)


def _new_figure(*, width_inches: float, height_inches: float) -> Figure:
    # Figure and canvas by hand: pyplot would choose a backend for the whole process and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _save_png(figure: Figure, path: Path) -> None:
    _replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


# -- Files ------------------------------------------------------------------------------------------------------------


def _replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path` and move it there, so that `path` is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
