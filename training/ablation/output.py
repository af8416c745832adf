"""An ablation's files: the table as text and JSON, the chart of accuracy against cost, and the recommended recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data.whole_files import replace_file
from training.ablation.verdict import Row, pareto_front
from training.results.figures import EVAL_COLOR, TEXT_COLOR, TRAIN_COLOR, new_figure, save_png, style_axes
from training.results.summary import write_json
from training.results.text import format_exact_seconds


def format_table(table: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [["variant", "epochs", "seeds", "top-1", "spread", "training", "verdict"]]
    for row in table:
        deviation = "-" if row.spread is None else f"{100 * row.spread:.2f}"
        seconds = format_exact_seconds(row.train_seconds)
        cells.append(
            [row.name, str(row.epochs), str(row.seeds), f"{100 * row.top1:.2f} %", deviation, seconds, row.verdict]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def write_results(
    folder: Path, results: Sequence[Mapping[str, Any]], tables: Mapping[str, Sequence[Row]], refused: Mapping[str, str]
) -> None:
    """Write ablation.json, and for each kind of comparison a table and a chart."""
    for equal, table in tables.items():
        text = format_table(table) + "\n"
        replace_file(folder / f"equal_{equal}.txt", lambda file, text=text: file.write(text.encode()))
        draw_front(table, folder / f"equal_{equal}.png", equal=equal)
    write_json(
        {
            "tables": {equal: [asdict(row) for row in table] for equal, table in tables.items()},
            "refused": refused,
            "runs": results,
        },
        folder / "ablation.json",
    )


def write_recommended(
    settings: Mapping[str, Any], reason: str, table: Sequence[Row], *, equal: str, path: Path
) -> None:
    """Write the recipe, with the evidence as comments above it."""
    evidence = [reason, "", f"At equal {equal}:", "", *format_table(table).splitlines()]
    head = "".join(f"# {line}".rstrip() + "\n" for line in evidence)
    text = head + "\n" + yaml.safe_dump(dict(settings), sort_keys=False)
    replace_file(path, lambda file: file.write(text.encode()))


def draw_front(table: Sequence[Row], path: Path, *, equal: str) -> None:
    """Top-1 against training time, with bars of one standard deviation and the Pareto front."""
    figure = new_figure(width_inches=9, height_inches=5.6)
    axes = figure.add_subplot()
    style_axes(axes, title=f"Top-1 against training time, at equal {equal}", x_label="training time (s)",
               y_label="top-1 (%)")  # fmt: skip
    front = pareto_front(table)
    axes.plot([row.train_seconds for row in front], [100 * row.top1 for row in front], color=TRAIN_COLOR, linewidth=1.4,
              label="Pareto front", zorder=1)  # fmt: skip
    for row in table:
        color = EVAL_COLOR if row in front else TEXT_COLOR
        place, bar = (row.train_seconds, 100 * row.top1), 100 * (row.spread or 0)
        axes.errorbar(*place, yerr=bar, fmt="o", markersize=4, color=color, elinewidth=0.8, capsize=2, zorder=2)
        axes.annotate(row.name, place, textcoords="offset points", xytext=(5, 3), fontsize=7.5, color=color)
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.1)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT_COLOR, loc="lower right")
    save_png(figure, path)
