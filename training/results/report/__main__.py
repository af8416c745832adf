"""Command line: python -m training.results.report RUN [RUN ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from training.command_line import carry_out
from training.results.report.page import MOST_RUNS, REPORT_FILE, write_report

_DESCRIPTION = f"""\
Write one HTML page on a finished run: summary, curves, phases, time, evaluation, recipe. A page on several runs (up to
{MOST_RUNS}) shows which settings differ and which run is ahead. It needs no network and no other file."""

_EXAMPLES = """\
examples
  python -m training.results.report results/digits_medium
  python -m training.results.report results/digits_medium results/digits_medium_speedups_off
  python -m training.results.report results/a results/b results/c -o abc.html

python evaluate.py RUN, before, adds the confusion matrix, the mistakes and the calibration of that run.
Exit status: 0 done, 2 a mistake or a damaged file, 130 stopped with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return carry_out("report", lambda: _write(options))


def _write(options: argparse.Namespace) -> int:
    print(write_report(options.runs, options.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.results.report",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, as results/digits_medium")
    parser.add_argument(
        "-o", "--output", metavar="FILE.html", help=f"the page (default: {REPORT_FILE} in the first run's folder)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
