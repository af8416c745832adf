"""The command line of `python -m training.ablate`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.command_line import carry_out, positive

_ABOUT = """\
Find out which speed-ups pay on your data: train the recipe with all of its algorithms, without each, with each alone
and without any, over several seeds; print means, spreads and significant differences; write the recipe to use."""

_EXAMPLES = """\
examples
  python -m training.ablate -f my.yaml                              three seeds, at equal epochs and at equal cost
  python -m training.ablate -f my.yaml --budget 2h                  what fits into two hours; call again to continue
  python -m training.ablate -f my.yaml --equal epochs --seeds 5 duration.epochs=15
  python -m training.ablate -f my.yaml --add "ema={half_life_steps: 100}"

At equal cost every variant trains for as many epochs as take the arithmetic of the run without algorithms. Intervals
are 95 % intervals of the differences between runs of equal seeds; one in twenty comparisons is significant by chance.

Files: results/<run_name>_ablation/ has a folder for each run, equal_epochs.txt and .png, equal_cost.txt and .png,
ablation.json and recommended.yaml. The same command continues an interrupted ablation.
Exit status: 0 done, 2 a mistake on the command line or in the recipe, 130 stopped with Ctrl-C."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return carry_out("ablate", lambda: _ablate(options))


def _ablate(options: argparse.Namespace) -> int:
    from training.ablation import carry_out as runs
    from training.ablation.output import format_table, write_results
    from training.ablation.variants import COST, EPOCHS, variants_of
    from training.ablation.verdict import rows
    from training.engines.ranks.start import start_distributed
    from training.planning import choose_place

    started = time.monotonic()
    recipe = _recipe(options)
    start_distributed(recipe, choose_place(recipe))
    equals = [EPOCHS, COST] if options.equal == "both" else [options.equal]
    variants = variants_of(list(recipe.algorithms))
    made = runs.carry_out(recipe, variants, equals=equals, seeds=options.seeds, budget_seconds=options.budget, say=_say)
    if not made.results:
        raise ValueError(f"the budget of {options.budget:g} s ended before the first run; give more")
    results = runs.with_shared_runs(made.results, equals)
    tables = {equal: table for equal in equals if (table := rows(results, equal=equal))}
    if not _is_rank_0():
        return 0
    write_results(recipe.results_dir, results, tables, made.refused)
    for equal, table in tables.items():
        _say(f"\n== at equal {equal} ==\n{format_table(table)}")
    for name, reason in made.refused.items():
        _say(f"{name} cannot run: {reason}")
    _recommend(recipe, tables, results)
    if made.left:
        _say(f"{made.left} runs did not fit into the budget; the same command goes on with them")
    _say(f"{time.monotonic() - started:,.0f} s; files: {recipe.results_dir}/")
    return 0


def _recipe(options: argparse.Namespace) -> Any:
    """The recipe with what is added; its results_dir is the ablation's folder, and its bars are off."""
    from training.recipe import load_recipe, recipe_from

    added = []
    for one in options.add:
        name, _, settings = one.partition("=")
        added.append(f"algorithms.{name}={settings or '{}'}")
    recipe = load_recipe(options.file, [*options.overrides, *added])
    folder = Path(recipe.results_dir) / f"{recipe.run_name}_ablation"
    settings = {
        **recipe.settings,
        "results_dir": str(folder),
        "logging": {**recipe.settings["logging"], "progress_bar": False},
        "checkpoints": {**recipe.settings["checkpoints"], "keep_best": False, "remote": None},
    }
    return replace(recipe_from(settings), run_name=recipe.run_name)


def _recommend(recipe: Any, tables: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    from training.ablation.output import write_recommended
    from training.ablation.variants import COST, Variant, plan_variant
    from training.ablation.verdict import recommended

    # At equal cost more epochs stand for what an algorithm saves, which is what a budget asks.
    equal = COST if COST in tables else next(iter(tables))
    chosen, reason = recommended(tables[equal], results, equal=equal)
    run = plan_variant(recipe, Variant(chosen.name, chosen.algorithms), equal=equal, seed=recipe.seed)
    settings = {
        **run.recipe.settings,
        "run_name": f"{recipe.run_name}_recommended",
        "results_dir": str(recipe.results_dir.parent),
        "autoresume": False,
        "on_nan": recipe.on_nan,
        "logging": {**run.recipe.settings["logging"], "progress_bar": None},
        "checkpoints": {**run.recipe.settings["checkpoints"], "keep_best": True},
    }
    path = recipe.results_dir / "recommended.yaml"
    write_recommended(settings, reason, tables[equal], equal=equal, path=path)
    _say(f"\nrecommended: {', '.join(chosen.algorithms) or 'no algorithm'}, {chosen.epochs} epochs. {reason}.\n{path}")


def _say(text: str) -> None:
    if _is_rank_0():
        print(text, flush=True)


def _is_rank_0() -> bool:
    from composer.utils import dist

    return dist.get_global_rank() == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.ablate", description=_ABOUT, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="the recipe")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each variant (default: 3)")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="such as 90s, 30m or 2h; start no run that would probably end later",
    )
    parser.add_argument(
        "--equal",
        default="both",
        choices=("epochs", "cost", "both"),
        help="what is equal for all variants (default: both)",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME=SETTINGS",
        help="add an algorithm that the recipe does not have",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to set")
    return parser


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a time such as 90s, 30m, 2h or 1d")
    return float(found[1]) * _UNITS[found[2] or "s"]


if __name__ == "__main__":
    sys.exit(main())
