"""How `make docs` shows docstrings: lines `argument: meaning` as a list (an extension of griffe, see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (.+)$")


class ArgumentLists(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """`docstring` with a list in place of each paragraph whose first line is `argument: meaning`."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(_as_list(one) if _ARGUMENT.match(one.split("\n")[0]) else one for one in paragraphs)


def _as_list(paragraph: str) -> str:
    items: list[str] = []
    for line in paragraph.split("\n"):
        start = _ARGUMENT.match(line)
        if start:
            names = ", ".join(f"`{name}`" for name in start[1].split(", "))
            items.append(f"- {names}: {start[2]}")
        else:
            items.append(f"    {line.strip()}")
    return "\n".join(items)
