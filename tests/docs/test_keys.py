"""docs/recipes/index.md has every key of a recipe and its default; docs/models.md and data.md have every setting."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import omegaconf
import pytest

from data.loading.augment import AUGMENTATIONS
from data.sources import SOURCES
from models import registry
from training.recipe.keys import FSDP, RecipeKeys

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "recipes" / "index.md"
# Sections that are one row, whose keys another page lists.
_ONE_ROW = (FSDP,)


def _keys(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each key's path and its default; omegaconf.MISSING where one is required."""
    hints = get_type_hints(section)
    for field in fields(section):
        of = next((one for one in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(one)), None)
        optional = field.default is None
        if of is not None and not optional and of not in _ONE_ROW:
            yield from _keys(of, f"{path}{field.name}.")
        else:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            yield path + field.name, default


def _rows() -> dict[str, str]:
    """Each key on the page and its default there. A name after a comma has the section of the one before it."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) != 5 or not cells[1].startswith("`"):
            continue
        names = re.findall(r"`([\w.]+)`", cells[1])
        defaults = re.split(r", (?![^\[]*\])", cells[3])
        section = names[0].rpartition(".")[0]
        for number, name in enumerate(names):
            whole = name if number == 0 or not section else f"{section}.{name}"
            found[whole] = defaults[number] if len(defaults) == len(names) else cells[3]
    return found


ROWS = _rows()


@pytest.mark.parametrize(("key", "default"), [pytest.param(*one, id=one[0]) for one in _keys(RecipeKeys)])
def test_the_page_has_the_key_and_its_default(key: str, default: Any) -> None:
    if any(row.startswith(f"{key}.") for row in ROWS):
        return  # the page lists what is in it
    assert key in ROWS
    if default is omegaconf.MISSING:
        assert ROWS[key] == "required"
    elif isinstance(default, bool):
        assert ROWS[key] == str(default).lower()
    elif isinstance(default, int | float):
        assert float(ROWS[key]) == default
    elif isinstance(default, str):
        assert ROWS[key].strip("`") == default


_SETTINGS = [
    *(pytest.param("models.md", name, registry.find(name), id=name) for name in registry.names()),
    *(pytest.param("data.md", name, make, id=name) for name, make in {**SOURCES, **AUGMENTATIONS}.items()),
]
# Given by a recipe's other sections, or named once for all.
_NOT_IN_ROWS = ("num_classes", "split", "probability")


@pytest.mark.parametrize(("page", "name", "make"), _SETTINGS)
def test_the_page_has_every_setting(page: str, name: str, make: Any) -> None:
    rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
    rows = [row for row in rows if page == "models.md" or f"`{name}`" in row]
    assert any(f"`{name}`" in row for row in rows)
    for setting in inspect.signature(make).parameters:
        assert setting in _NOT_IN_ROWS or any(f"`{setting}`" in row for row in rows), setting
