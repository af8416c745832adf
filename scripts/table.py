"""Write the tables of algorithms from the registry, between their two marks: python scripts/table.py"""

from __future__ import annotations

from pathlib import Path

from algos.framework import registry

ROOT = Path(__file__).parent.parent
# Where a table stands, and where the algorithms' pages are from there.
PAGES = {ROOT / "README.md": "docs/algorithms/", ROOT / "docs" / "algorithms" / "index.md": ""}
BEGIN, END = "<!-- algorithms: begin (scripts/table.py) -->", "<!-- algorithms: end -->"


def table(folder: str) -> str:
    """One row per algorithm: name in a recipe, functional form, what it does, its page in `folder`."""
    lines = ["| In a recipe | In your own loop | What it does |", "|---|---|---|"]
    for name in registry.names():
        lines.append(
            f"| [`{name}`]({folder}{name}.md) | `algos.{registry.functional_name(name)}` "
            f"| {registry.description(name)} |"
        )
    return "\n".join(lines)


def with_table(text: str, *, folder: str) -> str:
    """`text` with the table between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(folder)}\n{END}{after}"


if __name__ == "__main__":
    for page, folder in PAGES.items():
        page.write_text(with_table(page.read_text(), folder=folder))
