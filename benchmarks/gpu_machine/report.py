"""The report of a GPU check: rows, their JSON with its schema, and their table. Needs the standard library alone.

    {"schema": 1, "started": "2026-01-31T12:00:00+00:00", "seconds": 312.5, "commit": "abc1234", "device": "cuda",
     "stopped": false, "environment": {...}, "rows": [ROW, ...]}

    ROW = {"part": "recipe", "item": "amp_bf16 128 px", "status": "passed", "seconds": 8.1, "note": "...", "error": [],
           "figures": {"images_per_second": 5120.0, ...}}

`environment` is what `benchmarks.gpu_machine.environment` found, empty where that failed. `error` holds the last lines
of a failure's output, and `figures` numbers, text, or null for what was not measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

SCHEMA = 1
Status = Literal["passed", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("passed", "failed", "skipped")
PARTS = ("environment", "tests", "benchmark", "recipe")
KEYS = {
    "schema": int, "started": str, "seconds": (int, float), "commit": (str, type(None)), "device": str,
    "stopped": bool, "environment": dict, "rows": list,
}  # fmt: skip
ROW_KEYS = {
    "part": str, "item": str, "status": str, "seconds": (int, float, type(None)), "note": str, "error": list,
    "figures": dict,
}  # fmt: skip
_NOTE_CHARACTERS = 110


@dataclass
class Row:
    """One line of the table. note: what was found, or the reason; error: a failure's last lines."""

    part: str
    item: str
    status: Status
    seconds: float | None = None
    note: str = ""
    error: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def make_report(
    rows: Sequence[Row],
    *,
    started: str,
    seconds: float,
    commit: str | None,
    device: str,
    environment: dict[str, Any],
    stopped: bool,
) -> dict[str, Any]:
    """The report as plain data, in which numbers that JSON lacks (NaN, infinity) are null."""
    report = {
        "schema": SCHEMA,
        "started": started,
        "seconds": round(seconds, 1),
        "commit": commit,
        "device": device,
        "stopped": stopped,
        "environment": environment,
        "rows": [asdict(row) for row in rows],
    }
    return cast("dict[str, Any]", _plain(report))


def problems(report: Any) -> list[str]:
    """What is wrong with a report as read from JSON; nothing if it follows the schema."""
    found = _wrong_keys(report, KEYS, "report")
    if found:
        return found
    if report["schema"] != SCHEMA:
        return [f"report.schema is {report['schema']}, not {SCHEMA}"]
    for index, row in enumerate(report["rows"]):
        path = f"rows[{index}]"
        wrong = _wrong_keys(row, ROW_KEYS, path)
        if not wrong:
            for key, known in (("part", PARTS), ("status", STATUSES)):
                if row[key] not in known:
                    wrong.append(f"{path}.{key} is {row[key]!r}; known: {', '.join(known)}")
            if row["status"] == "skipped" and not row["note"]:
                wrong.append(f"{path} is skipped without a reason in its note")
            if row["status"] == "failed" and not (row["note"] or row["error"]):
                wrong.append(f"{path} failed without a note or an error")
        found += wrong
    return found


def exit_status(report: dict[str, Any]) -> int:
    """130 if it was stopped, 1 if anything failed, 0 otherwise."""
    if report["stopped"]:
        return 130
    return int(any(row["status"] == "failed" for row in report["rows"]))


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per row, below a failure its last lines, and the sums at the end."""
    lines = [("part", "item", "result", "seconds", "note")]
    errors: list[list[str]] = [[]]
    for row in _together(report["rows"]):
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append((row["part"], row["item"], row["status"], seconds, _short(row["note"])))
        errors.append(row["error"] if row["status"] == "failed" else [])
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = []
    for line, error in zip(lines, errors, strict=True):
        cells = [cell.rjust(width) if place == 3 else cell.ljust(width)
                 for place, (cell, width) in enumerate(zip(line[:4], widths, strict=True))]  # fmt: skip
        text.append("  ".join([*cells, line[4]]).rstrip())
        text += [f"    | {said}" for said in error]
    counts = {status: sum(row["status"] == status for row in report["rows"]) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    stopped = "; stopped before its end" if report["stopped"] else ""
    return "\n".join([*text, "", f"{told} in {report['seconds']:.0f} s on {report['device']}{stopped}"]) + "\n"


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write gpu_check.json and gpu_check.txt to `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "gpu_check.json", folder / "gpu_check.txt"
    texts = json.dumps(report, indent=1, allow_nan=False) + "\n", table(report)
    for path, text in zip(paths, texts, strict=True):
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return paths


def _wrong_keys(value: Any, keys: dict[str, Any], path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path} is not a mapping"]
    wrong = [f"{path}.{key} is missing" for key in keys if key not in value]
    wrong += [f"{path}.{key} is unknown" for key in value if key not in keys]
    for key, kinds in keys.items():
        is_number = kinds is not bool and isinstance(value.get(key), bool)
        if key in value and (is_number or not isinstance(value[key], kinds)):
            wrong.append(f"{path}.{key} is {value[key]!r}, of another type")
    return wrong


def _together(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the tests that were skipped for one reason as one row in the place of the first."""
    skipped = Counter(row["note"] for row in rows if _is_skipped_test(row))
    found, seen = [], set()
    for row in rows:
        count = skipped[row["note"]] if _is_skipped_test(row) else 1
        if count == 1:
            found.append(row)
        elif row["note"] not in seen:
            seen.add(row["note"])
            found.append({**row, "item": f"{count} tests", "seconds": None})
    return found


def _is_skipped_test(row: dict[str, Any]) -> bool:
    return row["part"] == "tests" and row["status"] == "skipped"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _NOTE_CHARACTERS else f"{line[: _NOTE_CHARACTERS - 3]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
