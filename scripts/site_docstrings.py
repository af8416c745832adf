"""How `make docs` shows docstrings: lines `argument: meaning` as lists (griffe's extension in mkdocs.yml)."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.+)$")
_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


class ArgumentLists(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """`docstring` with a list in place of each paragraph of `argument: meaning`, and of each section `Args:`."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", docstring)))


def _paragraph(text: str) -> str:
    first, _, rest = text.partition("\n")
    if first in _SECTIONS and rest.startswith("    "):
        return f"**{first}**\n\n{_as_list(textwrap.dedent(rest))}"
    return _as_list(text) if _ARGUMENT.match(first) else text


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
