"""Every message of the project, found in its code: python scripts/messages.py [--write]

Lists what docs/messages.md lacks or has too much, and which messages neither say what to do nor are explained in
docs/troubleshooting.md; the exit status is then 1. `--write` writes docs/messages.md. A message is shown by its fixed
words, with … for each value.

An entry of docs/troubleshooting.md is a list item that begins with words of one or more messages as code, as in
"- `no whole checkpoint`, `is damaged`: ...".
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED, LISTED = ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "messages.md"
HOLE = "…"

# Group -> the modules whose messages belong there; where several fit, the longest prefix counts.
GROUPS = {
    "Recipe": ("training/recipe", "training/planning", "training/optimizers", "training/facts", "training/network"),
    "Data": ("data",),
    "Loaders": ("data/loading", "data/decoding", "data/prefetch"),
    "Engines": ("training/engines", "training/build"),
    "Ranks": ("training/engines/peers", "training/engines/start", "training/engines/ranks"),
    "Checkpoints": ("training/checkpoints", "training/trained"),
    "Running": ("training",),
    "Results": ("training/results", "training/judging", "training/ablat", "training/probing"),
    "Export and page": ("training/exporting", "training/export", "training/demo"),
    "Environment": ("training/composer_shim", "training/command_line", "training/engines/lean_import"),
    "Algorithms": ("algos",),
    "Models": ("models",),
}

# Calls that show their words to somebody: exceptions, and functions that print or make one.
_EXCEPTION = re.compile(
    r"(?:\w+\.)?(?:\w*Error|UnusableImage|BadLabel|DamagedCheckpoint|DamagedTar|FolderTaken|NotFinite|NotTheSame)$"
)
_INTERNAL = {"AttributeError", "AssertionError", "pickle.UnpicklingError", "_LeftOutError", "NotImplementedError"}
_SHOWING = {
    "_broken", "damaged_image", "complain", "_complain", "parser.error", "warnings.warn", "log.warning", "log.error",
    "say", "self._say", "self._end",
}  # fmt: skip
# Functions whose result is, or ends up in, a message.
_TEXTS = {
    "describe_missing", "describe_mismatch", "describe_lost_rank", "describe_out_of_memory", "_reason", "_os_error",
    "_described", "_gradient_text", "_images_text", "_advice", "_difference", "find_damage", "_damage_of_archive",
    "_not_writable", "_what_is_left", "refusal", "listing",
}  # fmt: skip
_NO_TEXTS = {"algos/progressive_resizing.py", "training/exporting/formats.py", "training/recipe/schema.py"}
# A name before somebody else's words, and lines of progress.
_PROGRESS = re.compile(rf"^(?:[\w.]+|left out): {HOLE}$|\.\.\.$|^{HOLE} s a step; took|, {HOLE} ETA {HOLE}$")
# Words by which a message says what is allowed or what to do.
_REPAIR = re.compile(
    r"\b(?:must|give|use|set|leave|make|drop|install|pip|correct|choose|remove|repair|known|allowed|add|pass|continue|"
    r"lower|raise|turn|draw|download|write|wait|convert|change|train|shorten|lengthen|save|fetch|start|average|evaluate|"
    r"normalize|list it|put|run (?:one|forward|this)|go on|lie in|at least|at most|count from|a row is|"
    r"takes (?:1|two|exactly)|every machine needs)\b|(?:keys are|has|here): |form key=value|pairs of|neither",
    re.IGNORECASE,
)


class Message(NamedTuple):
    """A message's fixed words, and the file they are in."""

    words: str
    file: str

    @property
    def group(self) -> str:
        fitting = {prefix: name for name, all_ in GROUPS.items() for prefix in all_ if self.file.startswith(prefix)}
        return fitting[max(fitting, key=len)]


@cache
def messages() -> list[Message]:
    """Every message in the code, once for each file, by file and place."""
    files = sorted(file for top in ("algos", "data", "models", "training") for file in (ROOT / top).rglob("*.py"))
    named = ((file.read_text(), str(file.relative_to(ROOT))) for file in files)
    return list(dict.fromkeys(found for code, name in named for found in messages_in(code, name)))


def messages_in(code: str, name: str) -> Iterator[Message]:
    """The messages in the code of the file `name`, some of them more than once."""
    tree = ast.parse(code)
    for function in (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))):
        assigned = _assigned(function)
        is_text = isinstance(function, ast.FunctionDef) and function.name in _TEXTS and name not in _NO_TEXTS
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                found = _of_call(node, assigned)
            elif is_text and isinstance(node, ast.Return) and node.value is not None:
                found = _of_value(node.value, {})
            else:
                continue
            yield from (Message(words, name) for words in found)


def explained() -> dict[str, str]:
    """The words by which docs/troubleshooting.md names what it explains -> the heading that they are under."""
    found = {}
    for section in EXPLAINED.read_text().split("\n## ")[1:]:
        for start in re.findall(r"^- ((?:`[^`]+`,?\s+)*`[^`]+`):", section, re.MULTILINE):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", start), section.partition("\n")[0])
    return found


def page() -> str:
    """docs/messages.md: a table for each group."""
    entries = explained()
    lines = [
        "# All messages",
        "",
        "Written by `python scripts/messages.py --write` from the code, with … for each value. Messages give the value",
        "received, the rule and what to do. Those marked → are explained under [troubleshooting](troubleshooting.md).",
    ]
    for name in GROUPS:
        rows = [one for one in messages() if one.group == name]
        lines += ["", f"## {name}", "", "| message | from |", "|---|---|"]
        lines += [f"| `{one.words}`{_link(one, entries)} | `{one.file}` |" for one in rows]
    return "\n".join([*lines, ""])


def problems() -> list[str]:
    """What is wrong with the two pages, a line each."""
    words = [one.words for one in messages()]
    entries = explained()
    wrong = [f"explained, and in no file: {entry}" for entry in entries if not any(entry in one for one in words)]
    wrong += [
        f"says no repair, and is not explained: {one.words} ({one.file})"
        for one in messages()
        if not _REPAIR.search(one.words) and not any(entry in one.words for entry in entries)
    ]
    listed = LISTED.read_text().splitlines() if LISTED.exists() else []
    here = page().splitlines()
    wrong += [f"not in docs/messages.md: {line}" for line in here if line not in listed]
    wrong += [f"gone from the code, and in docs/messages.md: {line}" for line in listed if line not in here]
    return wrong


def _link(message: Message, entries: dict[str, str]) -> str:
    """To the section that explains the message, its own group's where there are several; nothing if there is none."""
    sections = [section for entry, section in entries.items() if entry in message.words]
    if not sections:
        return ""
    section = message.group if message.group in sections else sections[0]
    return f" [→](troubleshooting.md#{section.lower().replace(' ', '-')})"


def _assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """The values that each name gets in `function`; none for a module, whose functions are looked at one by one."""
    values: dict[str, list[ast.expr]] = {}
    if isinstance(function, ast.FunctionDef):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values.setdefault(node.targets[0].id, []).append(node.value)
    return values


def _of_call(call: ast.Call, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    name = ast.unparse(call.func)
    to_stderr = name == "print" and any(ast.unparse(word.value) == "sys.stderr" for word in call.keywords)
    if name in _INTERNAL or not (to_stderr or name in _SHOWING or _EXCEPTION.match(name)):
        return
    if name in ("RecipeError", "DamagedCheckpoint") and len(call.args) == 2:
        key = _words(call.args[0])
        for text in _of_value(call.args[1], assigned):
            yield text if key == "" else f"{HOLE if key is None else key}: {text}"
        return
    for argument in call.args:
        yield from _of_value(argument, assigned)


def _of_value(value: ast.expr, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    if isinstance(value, ast.IfExp):
        yield from _of_value(value.body, assigned)
        yield from _of_value(value.orelse, assigned)
    elif isinstance(value, ast.Tuple):
        for one in value.elts:
            yield from _of_value(one, assigned)
    elif isinstance(value, ast.Name):
        for one in assigned.get(value.id, ()):
            if not isinstance(one, ast.Name):
                yield from _of_value(one, assigned)
    else:
        words = " ".join((_words(value) or "").split())
        if len(re.findall(r"[A-Za-z]{2,}", words)) > 1 and " " in words and not _PROGRESS.search(words):
            yield words


def _words(value: ast.expr) -> str | None:
    """The fixed words of a string, with a hole for each value; None for anything else."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.sub(r"%(?:\.\d+)?[sdrfg]", HOLE, value.value)
    if isinstance(value, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in value.values]
        return re.sub(f"{HOLE}+", HOLE, "".join(parts))
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        sides = [_words(value.left), _words(value.right)]
        return None if sides == [None, None] else "".join(HOLE if side is None else side for side in sides)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/messages.md")
    if parser.parse_args().write:
        LISTED.write_text(page())
    wrong = problems()
    print("\n".join(wrong) or f"{len(messages())} messages, all of them listed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
