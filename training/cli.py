"""The command line of run.py."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

_DESCRIPTION = """\
Train an image classifier from a recipe: one YAML file that names the model, the data, the speed-ups, the optimizer and
the rest. Any key of it can be set on the command line."""

_EXAMPLES = """\
examples
  python run.py -f yamls/digits_medium.yaml                            one process
  composer -n 2 run.py -f yamls/digits_medium.yaml                     two processes on this machine
  python run.py -f yamls/digits_medium.yaml --plan                     what it would do, without training
  python run.py -f yamls/digits_medium.yaml --compare                  then again with every speed-up off
  python run.py -f yamls/digits_medium.yaml algorithms.sam=null        one speed-up off
  python run.py -f yamls/digits_medium.yaml algorithms.mixup.alpha=0.1 one setting changed
  python run.py -f yamls/digits_medium.yaml load=latest                continue a run that was stopped

Results go to results/<run_name>/: recipe.yaml, metrics.csv, metrics.npz, curves.png, summary.json, checkpoints/.
Exit status: 0 done, 1 training failed, 2 a mistake in the recipe or the command line, 130 stopped with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        from training.recipe import load_recipe
        from training.schema import RecipeError
    except ModuleNotFoundError as error:
        return _complain(f"{error.name} is not installed: pip install 'brisk-vision[train]'")
    try:
        recipe = load_recipe(options.file, options.overrides)
        logging.getLogger().setLevel(recipe.logging.level.upper())
        from training import report, session

        if options.plan:
            _say(session.plan_text(recipe))
        elif options.compare:
            _say(session.compare(recipe, say=_say))
            _say(f"results: {recipe.run_dir}/")
        else:
            result = session.train(recipe, say=_say)
            _say(report.format_summary(result.summary))
            _say(f"results: {recipe.run_dir}/")
    except RecipeError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("stopped; continue with the same command and load=latest", status=130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-f", "--file", required=True, metavar="FILE", help="the recipe, for example yamls/digits_medium.yaml"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan", action="store_true", help="print what the run will do and train nothing")
    mode.add_argument("--compare", action="store_true", help="train it, then again with every speed-up off")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe to set; null turns one off"
    )
    return parser


def _quiet_libraries() -> None:
    """Let through what a user can act on. Each entry names who warns, and why it is of no use here."""
    for message in (
        "pkg_resources is deprecated",  # some of Composer's dependencies
        ".*invalid escape sequence.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _complain(text: str, *, status: int = 2) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"run.py: {text}", file=sys.stderr, flush=True)
    return status
