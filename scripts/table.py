"""Write the README's table of algorithms from the registry, between its two marks: python scripts/table.py"""

from __future__ import annotations

from pathlib import Path

from algos.framework import registry

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- algorithms: begin (scripts/table.py) -->", "<!-- algorithms: end -->"


def table() -> str:
    """One row per algorithm: name in a recipe, functional form, what it does, its page."""
    lines = ["| In a recipe | In your own loop | What it does |", "|---|---|---|"]
    for name in registry.names():
        lines.append(
            f"| [`{name}`](docs/algorithms/{name}.md) | `algos.{registry.functional_name(name)}` "
            f"| {registry.description(name)} |"
        )
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the table between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
