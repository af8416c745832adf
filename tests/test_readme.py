"""The README is correct: its example runs, its table matches the registry, its links resolve."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert getattr(names["loss"], "requires_grad", False)


def test_the_tables_are_those_of_the_registry_and_of_the_newest_figures() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "table.py"))
    for page, folder in script["PAGES"].items():
        text = page.read_text()
        assert script["with_table"](text, folder=folder) == text, "run: make table"
    for page in script["EFFECT_PAGES"]:
        text = page.read_text()
        assert script["with_effect"](text, page) == text, "run: make table"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_fits_two_screens() -> None:
    assert len(README.splitlines()) <= 100
