"""The site: every page is in its navigation, its links lead somewhere, and its API is that of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from scripts import site_pages

ROOT = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):
    """mkdocs.yml without mkdocs' own tags."""


CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(item)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = _pages(CONFIG["nav"])
    own = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*own, *site_pages._FIRST])


def test_the_benchmarks_page_names_every_result() -> None:
    linked = set(site_pages.targets("docs/benchmarks.md"))
    results = {str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert results <= linked, results - linked


@pytest.mark.parametrize("package", ["algos", "data", "models", "training"])
def test_the_api_names_what_the_code_has(package: str) -> None:
    for shown, defined in site_pages.api(package):
        module, _, name = defined.rpartition(".")
        assert hasattr(import_module(module), name), shown
        if package in ("algos", "data"):
            assert hasattr(import_module(package), name), shown


def test_links_lead_to_the_same_file_in_the_site() -> None:
    text = "[a](../models.md#weights) [b](../../yamls/digits_medium.yaml) [c](https://example.org) [d](../../LICENSES)"
    assert site_pages.with_links(text, "docs/recipes/index.md") == (
        "[a](../models.md#weights) [b](../yamls/digits_medium.yaml.md) [c](https://example.org) [d](../../LICENSES)"
    )
    assert site_pages.with_links("[a](docs/faults.md)", "CHANGELOG.md") == "[a](faults.md)"
    found = site_pages.outside_files(["docs/recipes/index.md"])
    assert "yamls/digits_medium.yaml" in found
    assert "benchmarks/results/time_to_accuracy_2026-11-21_cpu.png" in found  # of a page that this one links to


def test_no_code_in_a_table_has_a_bar() -> None:
    """The repository's pages need a backslash before it, which the site would show."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert not re.search(r"`[^`\n]*\\\|[^`\n]*`", page.read_text()), page


def test_what_belongs_to_a_numbered_item_is_indented_by_four() -> None:
    given = "1. One:\n\n   ```python\n   x = 1\n   ```\n\n2. Two\n\nEnd\n   three"
    assert site_pages.with_wider_lists(given) == given.replace("   ```", "    ```").replace("   x", "    x")


def test_make_docs_installs_the_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    (named,) = re.findall(r"^DOCS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named.replace('"', "").split() == [re.split("[<>=]", one)[0] for one in extra]
    for pins in (ROOT / "constraints").glob("*.txt"):
        for one in extra:
            name = one.partition(">")[0].partition("[")[0]
            assert re.search(rf"^{name}==", pins.read_text(), re.MULTILINE), f"{pins}: {one}"


@pytest.mark.timeout(200)
def test_it_builds_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    """With --strict, as `make docs` does it; the tools are not part of `make setup`."""
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(tool)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "site" / "algorithms" / "blurpool.html").read_text()
    assert "<math" in card
    assert "$$" not in card
    assert (tmp_path / "site" / "algorithms" / "sam.html").read_text().count("<math") == 2  # one within a line
    assert 'id="algos.mixup.mixup_batch"' in (tmp_path / "site" / "api" / "algos.html").read_text()
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|icon|preconnect)"[^>]* href="([^"]+)"', page.read_text())
        assert not [one for one in loaded if "://" in one], page
    shutil.rmtree(tmp_path / "site")


def test_a_docstrings_arguments_are_a_list() -> None:
    docstrings = pytest.importorskip("griffe") and import_module("scripts.site_docstrings")
    given = "Mix.\n\nlam: weight,\n    in [0, 1].\nalpha, beta: more.\n\nArgs:\n    path: a file.\n\nRaises none: no."
    assert docstrings.as_markdown(given) == (
        "Mix.\n\n- `lam`: weight,\n    in [0, 1].\n- `alpha`, `beta`: more.\n\n"
        "**Args:**\n\n- `path`: a file.\n\nRaises none: no."
    )
