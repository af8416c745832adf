"""One picture of a report: images/s against image size, a line for each way to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.algorithm_variants import OURS


def lines_of(report: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Label -> image size in px -> images/s, of the steps without an algorithm; the last of a step measured twice."""
    lines: dict[str, dict[int, float]] = {}
    for row in (row for group in report["groups"] for row in group["rows"]):
        if "step_ms" in row and not row["algorithm"] and row["library"] == OURS:
            lines.setdefault(f"{row['network']} {row['label']}", {})[row["image_size"]] = row["images_per_second"]
    return {label: dict(sorted(points.items())) for label, points in lines.items()}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture. Raises ModuleNotFoundError without matplotlib, OSError where it cannot be written."""
    from matplotlib.figure import Figure

    from data.whole_files import replace_file

    lines = lines_of(report)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=label)
    sizes = sorted({size for points in lines.values() for size in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="image size, px", ylabel="images/s")
    axes.set_ylim(bottom=0)
    device = report["hardware"].get("gpu") or report["hardware"]["cpu"]
    axes.set_title(f"Training steps on {device}, {report['date']}")
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(fontsize="small", loc="outside right upper")
    replace_file(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix(".")))
