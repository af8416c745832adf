"""Charts as SVG for a page that chooses the colors: each color in them is a CSS variable of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws with these stand-ins, which are then replaced by the variables.
_INK, _GRID, _AXIS = "#010101", "#010102", "#010103"
_VARIABLES = {_INK: "--ink-soft", _GRID: "--grid", _AXIS: "--axis"}
_RUN_STAND_IN = "#0102{:02x}"
_WIDTH_POINTS, _HEIGHT_POINTS = 344, 214  # close to the width of a phone, so that 10 points there are about 10 px
_FONT_POINTS = 10.5
_MOST_POINTS = 600
_FAR = 3  # times what 90 % of the values are below
_LABEL_GAP = 0.095  # between the labels of two lines, as a share of the axes' height
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    run: the number of the run, from 0, which has a color of its own: the variable --run-0.
    name: what the line is, for the chart's description.
    label: what stands at the line's end, before its last value; None: neither stands there.
    faint: drawn thin and dashed.
    """

    x: np.ndarray
    y: np.ndarray
    run: int
    name: str
    label: str | None = ""
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart over epochs or seconds.

    name: unique in the page, and used in the SVG's ids.
    unit: of the y axis, in the page's caption.
    show: formats a value.
    from_zero: the y axis begins at 0, and is cut where a few values are far above the others, as the first losses are.
    stairs: each value holds from the previous x to its own, as those of epochs do.
    """

    name: str
    title: str
    unit: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    x_label: str = "epoch"
    from_zero: bool = False
    stairs: bool = False


def chart_svg(chart: Chart) -> str:
    """The chart as an <svg> element for a page, with a title and a description for those who do not see it.

    It holds no scripts, no references outside of itself, and every text in it is escaped.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    fonts = ["DejaVu Sans"]  # to measure with; the page has its own
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.sans-serif": fonts}):
        figure = Figure(figsize=(_WIDTH_POINTS / 72, _HEIGHT_POINTS / 72), facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.135, 0.18, 0.6, 0.76), facecolor="none")
        _draw(axes, chart)
        return _for_page(_saved(figure), chart)


def description(chart: Chart) -> str:
    """What the chart shows, in words: the first and the last value of each line."""
    said = []
    for line in chart.lines:
        finite = line.y[np.isfinite(line.y)]
        if len(finite):
            said.append(f"{line.name}: {chart.show(finite[0])} at first, {chart.show(finite[-1])} at the end")
    return f"{chart.title} ({chart.unit}) by {chart.x_label}. {'; '.join(said) or 'Not measured'}."


def cut_above(chart: Chart) -> float | None:
    """Where the y axis ends although values are above; None if it has them all."""
    values = np.concatenate([np.zeros(0), *(line.y[np.isfinite(line.y)] for line in chart.lines)])
    if not chart.from_zero or not len(values):
        return None
    usual = float(np.percentile(values, 90))
    return 1.5 * usual if values.max() > _FAR * usual > 0 else None


def _draw(axes: Axes, chart: Chart) -> None:
    _style(axes, chart)
    ends: list[tuple[float, Line]] = []
    for line in chart.lines:
        x, y = _thinned(line.x, line.y)
        if not np.isfinite(y).any():
            continue
        look: dict[str, Any] = {"color": _RUN_STAND_IN.format(line.run), "linewidth": 1.0 if line.faint else 2.0}
        if line.faint:
            look["dashes"] = (3, 2)
        if chart.stairs:
            axes.stairs(y, np.concatenate([x[:1] - 1, x]), baseline=None, color=look["color"], linewidth=2.0)
        else:
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, marker=marker, markersize=4, solid_joinstyle="round", **look)
        ends.append((float(y[np.isfinite(y)][-1]), line))
    if not ends:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_INK, fontsize=_FONT_POINTS)
    _limit(axes, chart)
    _label_ends(axes, ends, chart.show)


def _style(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x_label, fontsize=_FONT_POINTS, color=_INK, labelpad=2)
    axes.tick_params(labelsize=_FONT_POINTS, labelcolor=_INK, color=_AXIS, length=3)
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6, integer=chart.x_label == "epoch")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_AXIS)


def _limit(axes: Axes, chart: Chart) -> None:
    last = max((float(np.nanmax(line.x)) for line in chart.lines if np.isfinite(line.x).any()), default=1.0)
    axes.set_xlim(0, max(last, 1e-9) * 1.02)
    if chart.from_zero:
        axes.set_ylim(0, cut_above(chart) or max(axes.get_ylim()[1], 1e-12) * 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    if value and (abs(value) >= 10_000 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{value / 1000:g}k" if 10_000 <= abs(value) < 1e6 else f"{mantissa}e{int(exponent)}"
    return f"{value:g}"


def _label_ends(axes: Axes, ends: list[tuple[float, Line]], show: Callable[[float], str]) -> None:
    """Write each line's label and last value to the right of its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    labeled = sorted([(value, line) for value, line in ends if line.label is not None], key=lambda end: end[0])
    places = _spread([(value - low) / (high - low) for value, _ in labeled])
    for place, (value, line) in zip(places, labeled, strict=True):
        axes.text(
            1.02,
            place,
            f"{line.label} {show(value)}".strip(),
            transform=axes.transAxes,
            va="center",
            fontsize=_FONT_POINTS,
            fontweight="normal" if line.faint else "bold",
            color=_RUN_STAND_IN.format(line.run),
            parse_math=False,
        )


def _spread(places: Sequence[float]) -> list[float]:
    """The ascending `places` moved apart by `_LABEL_GAP`, and kept within the axes as far as they fit."""
    spread: list[float] = []
    for place in places:
        spread.append(max(place, spread[-1] + _LABEL_GAP) if spread else place)
    ceiling = 1.0
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], ceiling)
        ceiling = spread[index] - _LABEL_GAP
    return spread


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS` of the points, with the first and the last: a long run has a million steps."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int)
    return x[kept], y[kept]


def _saved(figure: Figure) -> ElementTree.Element:
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return ElementTree.fromstring(file.getvalue())


def _for_page(svg: ElementTree.Element, chart: Chart) -> str:
    """The SVG without what only a file needs, with ids of its own, and the colors of the page."""
    for parent in list(svg.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):  # a style would apply to the whole page
                parent.remove(child)
    for element in svg.iter():
        element.tag = element.tag.removeprefix(_SVG)
        reference = element.attrib.pop(f"{_XLINK}href", None)
        if reference is not None:
            element.set("href", f"#{chart.name}-{reference.removeprefix('#')}")
        if "id" in element.attrib:
            element.set("id", f"{chart.name}-{element.get('id')}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.get("clip-path", "").replace("url(#", f"url(#{chart.name}-"))
        if "style" in element.attrib:
            element.set("style", _with_variables(element.get("style", "")))
    svg.attrib.clear()
    svg.attrib.update(
        {
            "viewBox": f"0 0 {_WIDTH_POINTS} {_HEIGHT_POINTS}",
            "role": "img",
            "aria-labelledby": f"{chart.name}-title {chart.name}-desc",
        }
    )
    for place, (tag, text) in enumerate((("title", chart.title), ("desc", description(chart)))):
        element = ElementTree.Element(tag, {"id": f"{chart.name}-{tag}"})
        element.text = text
        svg.insert(place, element)
    return ElementTree.tostring(svg, encoding="unicode")


def _with_variables(style: str) -> str:
    def variable(match: re.Match[str]) -> str:
        color = match.group().lower()
        if color in _VARIABLES:
            return f"var({_VARIABLES[color]})"
        return f"var(--run-{int(color[5:], 16)})" if color.startswith(_RUN_STAND_IN[:5]) else color

    return re.sub(r"#[0-9a-fA-F]{6}\b", variable, style)
