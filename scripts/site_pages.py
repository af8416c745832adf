"""Hooks of `make docs` (mkdocs.yml): pages and links from outside docs/, formulas, and the lists of the API.

A page links to files as they lie in the repository, so that links work there too. In the site, a page outside docs/
keeps its path, and any other text file becomes a page with its text.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_PICTURES = (".png", ".svg", ".json")
_LANGUAGES = {".yaml": "yaml", ".py": "python", ".sh": "bash"}
# From outside docs/, besides what pages link to.
_FIRST = ["CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/."""
    from mkdocs.structure.files import File

    for path in outside_files([f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")] + _FIRST):
        where = site_path(path)
        as_it_is = path.endswith((".md", *_PICTURES))
        content = (ROOT / path).read_bytes() if as_it_is else source_page(path).encode()
        files.append(File.generated(config, where, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, fill in the API, and set formulas."""
    uri = page.file.src_uri
    path = uri if page.file.generated_by else f"docs/{uri}"
    if uri.endswith((".yaml.md", ".py.md", ".sh.md")):
        return markdown
    return with_formulas(with_api(with_wider_lists(with_links(markdown, path))))


def outside_files(pages: list[str]) -> list[str]:
    """Paths in the repository, outside docs/, of what these pages and the pages that they link to lead to."""
    found: dict[str, None] = {path: None for path in pages if not path.startswith("docs/")}
    waiting = list(pages)
    while waiting:
        for target in targets(waiting.pop()):
            if not target.startswith(("docs/", "../")) and target not in found:
                found[target] = None
                waiting += [target] if target.endswith(".md") else []
    return sorted(found)


def targets(path: str) -> Iterator[str]:
    """Where the links of a page lead, as paths in the repository. Folders and addresses are left out."""
    for _, target, _ in _LINK.findall(without_code((ROOT / path).read_text())):
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if "://" not in target and (ROOT / there).is_file():
            yield there


def without_code(markdown: str) -> str:
    """The text outside of fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))


def site_path(path: str) -> str:
    """The path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", *_PICTURES)) else f"{path}.md"


def with_links(markdown: str, path: str) -> str:
    """Links that lead from the page `path` of the repository to files, as links within the site."""
    here = posixpath.dirname(site_path(path))

    def replace(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if "://" in target or not (ROOT / there).is_file():
            return match[0]
        return f"{before}{os.path.relpath(site_path(there), here or '.')}{after}"

    return _LINK.sub(replace, markdown)


def source_page(path: str) -> str:
    """A page with the text of the file `path`."""
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}````\n"


def with_wider_lists(markdown: str) -> str:
    """What belongs to an item of a numbered list indented by four spaces: Python-Markdown does not take three."""
    lines, in_item = [], False
    for line in markdown.split("\n"):
        in_item = bool(re.match(r"\d\. ", line)) or (in_item and (not line or line.startswith("   ")))
        lines.append(f" {line}" if in_item and line.startswith("   ") else line)
    return "\n".join(lines)


def with_formulas(markdown: str) -> str:
    """Formulas between $$, or with a backslash between $, as MathML, which browsers set without a script."""
    from latex2mathml.converter import convert

    def block(match: re.Match[str]) -> str:
        return f'\n<div class="formula">{convert(match[1].strip(), display="block")}</div>\n'

    markdown = re.sub(r"\$\$(.+?)\$\$", block, markdown, flags=re.DOTALL)
    within = re.compile(r"(?<!`)\$([^$`]*\\[^$`]*)\$(?!`)")
    lines = markdown.split("\n")
    return "\n".join(
        line if line.startswith("    ") else within.sub(lambda match: convert(match[1]), line) for line in lines
    )


def with_api(markdown: str) -> str:
    """Where a page says `<!-- api: algos -->`, the documentation of that package's public names."""
    return re.sub(r"<!-- api: (\w+) -->", lambda match: "\n\n".join(map(_directive, api(match[1]))), markdown)


def api(package: str) -> list[tuple[str, str]]:
    """(name to import, where it is defined) of every public name of a package, sorted but for `training`."""
    if str(ROOT) not in sys.path:  # mkdocs restores the path after it has imported this file
        sys.path.insert(0, str(ROOT))
    if package == "algos":
        import algos

        return [(f"algos.{name}", f"algos{module}.{name}") for name, module in sorted(algos._public_names().items())]
    if package == "data":
        import data

        return [(f"brisk.data.{name}", f"{_defined(data._PUBLIC[name], name)}") for name in sorted(data._PUBLIC)]
    if package == "models":
        from models import registry

        built = [f"{registry.find(name).__module__}.{name}" for name in registry.names()]
        return [(f"brisk.{name}", name) for name in (*_OF_MODELS, *built)]
    return [(name, name) for name in _OF_TRAINING]


_OF_MODELS = (
    "models.registry.find", "models.registry.names", "models.classifier.ImageClassifier", "models.weights.load_weights",
    "models.summary.summarize", "models.checkpointing.checkpoint_blocks", "models.sharding.sharding_units",
)  # fmt: skip
_OF_TRAINING = (
    "training.recipe.recipe.load_recipe", "training.recipe.recipe.Recipe", "training.recipe.schema.RecipeError",
    "training.planning.make.plan_run", "training.planning.plan.Plan", "training.planning.plan.Epoch",
    "training.planning.text.plan_text",
    "training.session.train", "training.session.compare", "training.session.Result",
    "training.trained.load_trained", "training.trained.Trained", "training.judging.evaluation.evaluate",
    "training.results.report.page.write_report", "training.exporting.export_run.export_run",
)  # fmt: skip


def _defined(module: str, name: str) -> str:
    """Where a name of `data` is defined; a source is known to `data.sources`, and defined in a module of it."""
    from data import __getattr__ as find

    return f"{getattr(find(name), '__module__', f'data{module}.{module[1:]}')}.{name}"


def _directive(names: tuple[str, str]) -> str:
    shown, defined = names
    return f'::: {defined}\n    options:\n      heading: "{shown}"\n      toc_label: "{shown.rpartition(".")[2]}"'
