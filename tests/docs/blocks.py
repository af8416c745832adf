"""The blocks of the documentation, and its commands taken apart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$", re.DOTALL)


class Block(NamedTuple):
    """A code block. language: of the fence; "" for an indented one. reason: why it is not run, if the page says so."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced and every indented block of `page`, in their order."""
    return list(_blocks(page, page.read_text().splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w+)$", lines[number])
        begins = lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip())
        if not fence and not begins:
            number += 1
            continue
        start, before = number, "\n".join(lines[:number])
        if fence:
            number = next(n for n in range(start + 1, len(lines)) if lines[n].strip() == "```") + 1
            inner = [line.removeprefix(fence[1]) for line in lines[start + 1 : number - 1]]
        else:
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            inner = [line[4:] for line in lines[start:number]]
        reason = _NOT_RUN.search(before)
        text = "\n".join(inner).strip("\n") + "\n"
        if not fence:
            indent = min(len(line) - len(line.lstrip()) for line in text.splitlines() if line)
            text = "\n".join(line[indent:] for line in text.splitlines()) + "\n"
        yield Block(page, start + 1, fence[2] if fence else "", text, reason and " ".join(reason[1].split()))


def mapping(text: str) -> dict[str, Any] | None:
    """`text` as YAML, if it is a mapping whose keys are those of a recipe."""
    from training.recipe.keys import RecipeKeys

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) and set(found) <= set(RecipeKeys.__dataclass_fields__) else None


def commands(text: str) -> list[list[str]]:
    """The commands of a block, without comments: their words, with `$` unexpanded."""
    if text.startswith("$ "):  # a session: commands, and what they print
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    found: list[list[str]] = []
    waiting = ""
    for line in text.splitlines():
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # an open quotation goes on in the next line
            waiting += "\n"
            continue
        if words:
            found.append(words)
        waiting = ""
    assert not waiting, f"an open quotation: {waiting}"
    return found


def variables(page: Path) -> dict[str, str]:
    """What the blocks of `page` assign: name="words"."""
    found = {}
    for block in blocks(page):
        for name, value in re.findall(r'^(\w+)="([^"]*)"$', block.text, re.MULTILINE):
            found[name] = " ".join(value.split())
    return found
