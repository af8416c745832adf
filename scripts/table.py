"""Write tables into pages, between their marks: python -m scripts.table

That of the algorithms comes from the registry, and their measured effects from the newest figures of
benchmarks/effects.py.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from algos.framework import registry
from benchmarks.effects import VARIANTS, effect, mean_text

ROOT = Path(__file__).parent.parent
# Where the table of algorithms stands, and where their pages are from there.
PAGES = {ROOT / "README.md": "docs/algorithms/", ROOT / "docs" / "algorithms" / "index.md": ""}
ALGORITHMS = "<!-- algorithms: begin (scripts/table.py) -->", "<!-- algorithms: end -->"
# Pages with a table of measured effects -> the variants of benchmarks/effects.py in it.
EFFECT_PAGES = {
    **{
        ROOT / "docs" / "algorithms" / f"{name}.md": [one for one in VARIANTS if VARIANTS[one].algorithm == name]
        for name in registry.names()
    },
    ROOT / "docs" / "optimizers.md": ["vit, muon", "vit, schedule-free"],
}
EFFECT = "<!-- effect: begin (scripts/table.py) -->", "<!-- effect: end -->"


def with_table(text: str, *, folder: str) -> str:
    """`text` with the table of algorithms between its marks replaced; `folder` leads to their pages."""
    return _between(ALGORITHMS, text, table(folder))


def with_effect(text: str, page: Path) -> str:
    """`text` of one of EFFECT_PAGES with the table of measured effects between its marks replaced."""
    figures = _newest_figures()
    about = Path(os.path.relpath(figures.with_suffix(".md"), page.parent)).as_posix()
    return _between(EFFECT, text, effect_table(json.loads(figures.read_text()), EFFECT_PAGES[page], about=about))


def table(folder: str) -> str:
    """One row per algorithm: name in a recipe, functional form, what it does, its page in `folder`."""
    lines = ["| In a recipe | In your own loop | What it does |", "|---|---|---|"]
    for name in registry.names():
        lines.append(
            f"| [`{name}`]({folder}{name}.md) | `algos.{registry.functional_name(name)}` "
            f"| {registry.description(name)} |"
        )
    return "\n".join(lines)


def effect_table(report: dict[str, Any], variants: list[str], *, about: str) -> str:
    """One row per variant and data set: top-1 without it, points over that with it, and CPU-seconds in proportion.

    about: where the page on the figures is from the one with the table.
    """
    lines = ["| data | top-1 without | with it, points | CPU-seconds |", "|---|---|---|---|"]
    for name in variants:
        detail = name.partition(", ")[2]
        for data, runs in report["data"].items():
            if name in runs:
                lines.append(_row(f"{data}, {detail}" if detail else data, runs, name))
    if len(lines) == 2:
        return f"Not measured yet: `python -m benchmarks.effects --only {' '.join(variants)}`."
    means = f"Means and standard errors of the differences, seed by seed ([figures]({about}))."
    return "\n".join([*lines, "", f"{means} Bold: Student's 95 % interval leaves out 0."])


def _row(label: str, runs: dict[str, list[dict[str, Any]]], name: str) -> str:
    found = effect(runs, name)
    points = mean_text(found).replace("-", "−")
    points = f"**{points}**" if found["told_apart"] else points
    seeds = "1 seed" if len(found["points"]) == 1 else f"{len(found['points'])} seeds"
    return f"| {label}, {seeds} | {found['without']:.2%} | {points} | {found['cpu_ratio']:.2f} times |"


def _newest_figures() -> Path:
    dated = (ROOT / "benchmarks" / "results").glob("effects_*.json")
    return max(dated, key=lambda path: re.findall(r"\d+-\d+-\d+", path.name))


def _between(marks: tuple[str, str], text: str, made: str) -> str:
    begin, end = marks
    if begin not in text or end not in text:
        raise ValueError(f"a page lacks {begin} or {end}; put both, one below the other, where its table belongs")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{made}\n{end}{after}"


if __name__ == "__main__":
    for page, folder in PAGES.items():
        page.write_text(with_table(page.read_text(), folder=folder))
    for page in EFFECT_PAGES:
        page.write_text(with_effect(page.read_text(), page))
