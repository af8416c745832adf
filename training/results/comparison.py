"""Two runs side by side: a table, one sentence on which is ahead, compare.json and compare.png."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.results.figures import plot_comparison
from training.results.history import History
from training.results.summary import write_json
from training.results.text import format_exact_seconds, format_loss, format_macs, format_rate, format_top1, is_known


def format_comparison(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Two summaries side by side under their labels, and one sentence on which is ahead in what.

    Raises:
        ValueError: there are not exactly two.
    """
    _check_pair(summaries, "summaries")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("top-1", "top1", format_top1),
        ("best top-1", "best_top1", format_top1),
        ("loss", "loss", format_loss),
        ("epochs", "epochs", str),
        ("training time", "train_seconds", format_exact_seconds),
        ("total time", "seconds", format_exact_seconds),
        ("throughput", "images_per_second", format_rate),
        ("forward MACs", "forward_macs", format_macs),
    ]
    # A resumed run's total time covers only its last session, so it is not comparable.
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
    return "\n".join([*lines, "", format_verdict(summaries)])


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
    write_json({"runs": summaries, "verdict": format_verdict(summaries)}, folder / "compare.json")
    plot_comparison(histories, folder / "compare.png")


def _check_pair(summaries: Mapping[str, Any], name: str) -> None:
    if len(summaries) != 2:
        raise ValueError(
            f"{name} of {len(summaries)} runs were given; a comparison takes exactly two, each under its label"
        )


def format_verdict(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence: which run is ahead in top-1 and in training time, by how much. Differences below the table's
    precision count as equal."""
    (first, a), (second, b) = summaries.items()
    return f"{_top1_clause(first, a, second, b)}; {_seconds_clause(first, a, second, b)}."


def _top1_clause(first: str, a: Mapping[str, Any], second: str, b: Mapping[str, Any]) -> str:
    if not (is_known(a.get("top1")) and is_known(b.get("top1"))):
        return "Top-1 was not measured in both runs"
    x, y = round(100 * a["top1"], 2), round(100 * b["top1"], 2)
    if x == y:
        return f"Top-1 is equal ({x:.2f} %)"
    ahead, behind = (first, second) if x > y else (second, first)
    high, low = max(x, y), min(x, y)
    return f"'{ahead}' is ahead of '{behind}' in top-1 by {high - low:.2f} points ({high:.2f} % against {low:.2f} %)"


def _seconds_clause(first: str, a: Mapping[str, Any], second: str, b: Mapping[str, Any]) -> str:
    # Training time if it is known, because a resumed run knows the wall time of its last session only.
    has_training_time = is_known(a.get("train_seconds")) and is_known(b.get("train_seconds"))
    key = "train_seconds" if has_training_time else "seconds"
    what = "training time" if key == "train_seconds" else "total time"
    resumed = a.get("resumed") or b.get("resumed")
    if not (is_known(a.get(key)) and is_known(b.get(key))) or (resumed and not has_training_time):
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
