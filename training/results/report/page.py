"""Puts the page together."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.whole_files import replace_file
from training.results.comparison import format_verdict
from training.results.report.charts import Chart, chart_svg, cut_above
from training.results.report.curves import phase_charts, phases_of, result_charts, run_letter, time_charts, time_parts
from training.results.report.reading import PICTURES, Run, evaluate_command, read_comparison, read_run
from training.results.report.settings import differing_settings
from training.results.text import (
    format_exact_seconds,
    format_loss,
    format_macs,
    format_rate,
    format_top1,
    is_known,
)

REPORT_FILE = "report.html"  # in a run's folder
MOST_RUNS = 8  # as many colors as are told apart
_MOST_ROWS = 20  # of a table of classes or mistakes
_PICTURE_TITLES = {
    "confusion": "Confusion matrix: true class by predicted class",
    "mistakes": "Mistakes, the most confident first",
    "calibration": "Calibration: accuracy by confidence",
    "sizes": "Accuracy by image size",
}


@dataclass(frozen=True)
class Column:
    """A run of the page: its number from 0, which is its color's, its letter, and what it is called."""

    index: int
    letter: str
    run: Run
    label: str


def write_report(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str] | None = None) -> Path:
    """Write one page on the runs in `folders`; returns its path.

    The page needs no other file and no network.

    path: by default report.html in the first run's folder.

    Raises:
        ValueError: a folder is no finished run, a file of it is damaged, or there are too many runs for a page.
        OSError: the page cannot be written.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs were given; a page takes 1 to {MOST_RUNS}")
    paths = [Path(folder) for folder in folders]
    runs = [read_run(folder) for folder in paths]
    target = paths[0] / REPORT_FILE if path is None else Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the page a name, as {target / REPORT_FILE}")
    text = render(runs, compared=read_comparison(paths[0]) if len(runs) == 2 else {})
    replace_file(target, lambda file: file.write(text.encode()))
    return target


def render(runs: Sequence[Run], *, compared: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The page's HTML.

    compared: label -> summary of compare.json; its labels are used if its runs are `runs`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breakable=_breakable,
        top1=format_top1,
        loss=format_loss,
        seconds=format_exact_seconds,
        rate=format_rate,
        macs=format_macs,
    )
    columns = _columns(runs, compared or {})
    histories = [run.history for run in runs]
    return environment.get_template("page.html.jinja").render(
        title=" / ".join(run.name for run in runs),
        columns=columns,
        differences=differing_settings([run.settings for run in runs]) if len(runs) > 1 else [],
        verdict=_verdict(columns),
        results=_result_rows(columns),
        charts={
            "results": _drawn(result_charts(histories)),
            "phases": _drawn(phase_charts(histories)),
            "time": _drawn(time_charts(histories)),
        },
        phases=[phases_of(history) for history in histories],
        parts=[_parts(run) for run in runs],
        evaluations=[_evaluation(run) for run in runs],
        most_rows=_MOST_ROWS,
    )


def _columns(runs: Sequence[Run], compared: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The runs under their letters. A label of compare.json serves if its summary is the run's own."""
    labels = [next((label for label, one in compared.items() if _is_of(one, run)), None) for run in runs]
    if None in labels or len(set(labels)) < len(runs):
        labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.folder) for run in runs]
    numbered = enumerate(zip(runs, labels, strict=True))
    return [Column(index, run_letter(index), run, str(label)) for index, (run, label) in numbered]


def _is_of(summary: Mapping[str, Any], run: Run) -> bool:
    return all(summary.get(key) == run.summary.get(key) for key in ("run_name", "top1", "epochs", "train_seconds"))


def _verdict(columns: Sequence[Column]) -> list[str]:
    """Which run is ahead, in sentences; none for a single run."""
    if len(columns) < 2:
        return []
    summaries = {column.label: column.run.summary for column in columns}
    if len(summaries) == 2:
        sentences = [format_verdict(summaries)]
    else:
        sentences = [
            *_best(columns, "top1", "Highest top-1", format_top1, highest=True),
            *_best(columns, "train_seconds", "Shortest training", format_exact_seconds, highest=False),
        ]
    machines = {_device(column.run.summary) for column in columns}
    if len(machines) > 1:
        sentences.append("The runs were made on different machines, so their times do not compare.")
    return sentences


def _best(columns: Sequence[Column], key: str, what: str, show: Any, *, highest: bool) -> list[str]:
    known = [column for column in columns if is_known(column.run.summary.get(key))]
    if len(known) < len(columns):
        return []
    best = (max if highest else min)(known, key=lambda column: column.run.summary[key])
    return [f"{what}: '{best.label}' ({show(best.run.summary[key])})."]


def _result_rows(columns: Sequence[Column]) -> list[tuple[str, list[str], int | None]]:
    """(title, a cell for each run, the best run's number or None) of the table of results."""
    summaries = [column.run.summary for column in columns]
    rows: list[tuple[str, list[str], int | None]] = []

    def add(title: str, key: str, show: Any, best: Any = None) -> None:
        values = [summary.get(key) for summary in summaries]
        if any(value is not None for value in values):
            cells = ["n/a" if value is None else show(value) for value in values]
            rows.append((title, cells, _place_of_best(values, cells, best)))

    add("top-1", "top1", format_top1, max)
    add("best top-1", "best_top1", format_top1, max)
    tests = [(summary.get("test") or {}).get("top1") for summary in summaries]
    if any(value is not None for value in tests):
        cells = [format_top1(value) for value in tests]
        rows.append(("test split top-1", cells, _place_of_best(tests, cells, max)))
    add("loss", "loss", format_loss)  # label smoothing and MixUp change what a loss means, so none is the best
    add("epochs", "epochs", str)
    add("training time", "train_seconds", format_exact_seconds, min)
    rows.append(("total time", [_total_time(summary) for summary in summaries], None))
    add("throughput", "images_per_second", format_rate, max)
    add("forward MACs", "forward_macs", format_macs, min)
    add("parameters", "parameters", lambda value: f"{value:,}")
    rows.append(("algorithms", [", ".join(summary.get("algorithms") or {}) or "none" for summary in summaries], None))
    add("seed", "seed", str)
    rows.append(("machine", [_device(summary) for summary in summaries], None))
    rows.append(("versions", [_versions(summary) for summary in summaries], None))
    rows.append(("folder", [str(column.run.folder) for column in columns], None))
    return rows


def _place_of_best(values: Sequence[Any], cells: Sequence[str], best: Any) -> int | None:
    if best is None or len(values) < 2 or len(set(cells)) == 1 or not all(is_known(value) for value in values):
        return None
    return list(values).index(best(values))


def _total_time(summary: Mapping[str, Any]) -> str:
    # That of a resumed run covers its last session only.
    return "n/a (resumed)" if summary.get("resumed") else format_exact_seconds(summary.get("seconds"))


def _device(summary: Mapping[str, Any]) -> str:
    hardware = summary.get("hardware") or {}
    gpus = hardware.get("gpus")
    names = [f"{count} × {name}" for name, count in gpus.items()] if isinstance(gpus, dict) else []
    device = ", ".join(names) or f"{hardware.get('cores') or '?'} cores of {hardware.get('cpu') or 'an unknown CPU'}"
    processes = summary.get("world_size") or 1
    return f"{device}, {processes} {'process' if processes == 1 else 'processes'}"


def _versions(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items() if version)


def _drawn(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [
        {"title": chart.title, "unit": chart.unit, "cut": cut_above(chart), "svg": Markup(chart_svg(chart))}
        for chart in charts
    ]


def _breakable(text: str) -> Any:
    """Escaped, with places where a long name may continue on the next line."""
    from markupsafe import Markup, escape

    broken = escape(text)
    for mark in ("_", "/"):
        broken = broken.replace(mark, mark + Markup("<wbr>"))
    return broken


def _parts(run: Run) -> list[tuple[str, float, float]]:
    """(name, seconds, share of all in percent) of what a run's time went into."""
    parts = time_parts(run.history, seconds=run.summary.get("seconds"), resumed=bool(run.summary.get("resumed", False)))
    total = sum(part.seconds for part in parts)
    return [(part.name, part.seconds, 100 * part.seconds / total) for part in parts]


def _evaluation(run: Run) -> dict[str, Any]:
    measured = run.evaluation or {}
    one_size = len(measured.get("sizes") or ()) == 1  # whose figures are those of the evaluation itself
    pictures = [
        (_PICTURE_TITLES[name], "data:image/png;base64," + base64.b64encode(run.pictures[name]).decode())
        for name in PICTURES
        if name in run.pictures and not (name == "sizes" and one_size)
    ]
    worst = [row for row in measured.get("worst_classes") or () if row.get("recall") != 1]
    return {
        "command": evaluate_command(run.folder),
        "measured": run.evaluation,
        "pictures": pictures,
        "worst": worst,
        "several_sizes": len(measured.get("sizes") or ()) > 1,
    }
