"""The command line of run.py."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.composer_shim import describe_mismatch, describe_missing, quiet_composer
from training.engines.lean_import import import_lean
from training.guards.stop_signals import WATCHED

if TYPE_CHECKING:
    from training.recipe import Recipe

_PAUSE_FOR_RANK_0_SECONDS = 10.0
_HOW_THREADS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPINS = "30000"
_DEAD_WORKER = "DataLoader worker (pid"  # torch raises it wherever the main thread is

_DESCRIPTION = """\
Train an image classifier from a recipe: one YAML file that names the model, the data, the speed-ups, the optimizer and
the rest. Any key of it can be set on the command line."""

_EXAMPLES = """\
examples
  python run.py -f yamls/digits_medium.yaml                            one process
  composer -n 2 run.py -f yamls/digits_medium.yaml                     two processes on this machine
  python run.py -f yamls/digits_medium.yaml --plan                     what the run will do, without training
  python run.py -f yamls/digits_medium.yaml --compare                  and again with every speed-up off
  python run.py -f yamls/digits_medium.yaml algorithms.sam=null        one speed-up off
  python run.py -f yamls/digits_medium.yaml algorithms.mixup.alpha=0.1 one setting changed
  python run.py -f yamls/digits_medium.yaml load=latest                continue a run that was stopped
  python run.py -f yamls/digits_medium.yaml --probe                    how long it will take here, in about a minute
  python run.py -f yamls/digits_medium.yaml --find-lr                  which learning rates suit it
  python run.py --list                                                 the recipes and hardware profiles here
  python run.py -f yamls/resnet50_medium.yaml -f yamls/hardware/8xa100.yaml --plan    with a hardware profile

Results go to results/<run_name>/: recipe.yaml, metrics.csv, metrics.npz, curves.png, summary.json, checkpoints/.
Exit status: 0 done, 1 training failed, 2 a mistake in the recipe or the command line, 130 stopped with Ctrl-C, 138 or
143 stopped by SIGUSR1 or SIGTERM after a checkpoint."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _options(arguments)
    if options.list:
        from training.recipe.listing import listing

        print(listing())
        return 0
    _quiet_libraries()
    if "composer" not in sys.modules:
        import_lean()
        _limit_spinning()
        # Nothing is open while the libraries are imported, and some of them take an interrupt for a missing module.
        # Composer's import puts a handler of its own in place.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return _stopped(options)
    except SystemExit as stop:
        # Composer and Checkpoints turn signals into an exit with 128 + the signal's number.
        if isinstance(stop.code, int) and stop.code - 128 in (signal.SIGINT, *WATCHED):
            return _stopped(options, stop.code)
        raise


def _run(options: argparse.Namespace) -> int:
    try:
        from training.recipe import RecipeError, load_recipe
    except ModuleNotFoundError as error:
        return _complain(describe_missing(error))
    try:
        recipe = options.recipe = load_recipe(options.file, options.overrides)
        logging.getLogger().setLevel(recipe.logging.level.upper())
        if options.plan:
            from training.without_compiler import leave_out_compiler

            leave_out_compiler()
            from training.planning.text import plan_text

            _say(plan_text(recipe))
            return 0
        if options.probe or options.find_lr:
            return _before_a_run(recipe, options)
        from training import session
        from training.results.report import REPORT_FILE
        from training.results.text import format_summary

        recipe = options.recipe = session.at_free_name(recipe, say=_say)
        if options.compare:
            _say(session.compare(recipe, say=_say))
            _say(f"report: {recipe.run_dir / REPORT_FILE}")
        else:
            _say(format_summary(session.train(recipe, say=_say).summary))
        _say(f"results: {recipe.run_dir}/")
    except RecipeError as error:
        return _complain(str(error))
    except (ConnectionResetError, EOFError) as error:  # a worker that died while it handed a batch over
        return _lost_worker(f"A worker process of the loader is gone ({str(error) or 'end of file'}).")
    except (ValueError, OSError) as error:
        # What the layers below say to users: a full disk, a file that vanished, a label beyond the model's classes.
        logging.getLogger(__name__).debug("raised here", exc_info=True)
        return _complain(f"{_described(error)} (logging.level=debug shows where)", status=1)
    except RuntimeError as error:
        return _lost_worker(" ".join(str(error).split())) if _DEAD_WORKER in str(error) else _lost_rank(error)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "composer":
            return _complain(describe_missing(error))
        text = describe_mismatch(error)
        if text is None:
            raise
        logging.getLogger(__name__).debug("raised here", exc_info=True)
        return _complain(f"{text} (logging.level=debug shows where)", status=1)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.file and not options.list:
        parser.error("the following arguments are required: -f/--file (--list shows what there is)")
    for name in ("ranks", "write_profile"):
        if getattr(options, name) is not None and not options.probe:
            parser.error(f"--{name.replace('_', '-')} belongs to --probe; add that, or leave this out")
    if options.write_profile is not None and Path(options.write_profile).exists():
        parser.error(f"--write-profile is {options.write_profile}, which exists; name a new file, or remove that one")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _before_a_run(recipe: Recipe, options: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        option, ranks = ("--probe", ", and name the ranks: --ranks N") if options.probe else ("--find-lr", "")
        return _complain(f"{option} runs in one process; start it without a launcher{ranks}")
    if options.find_lr:
        from training.probing.learning_rate import find_learning_rate

        _say(find_learning_rate(recipe, say=_say))
        return 0
    from training.probing.probe import probe, write_profile
    from training.probing.text import format_report

    report = probe(recipe, ranks=options.ranks or 1, say=_say)
    _say(format_report(report))
    if options.write_profile is not None:
        write_profile(report, Path(options.write_profile))
        _say(f"written: {options.write_profile}; use it with -f RECIPE -f {options.write_profile}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-f", "--file", action="append", metavar="FILE",
        help="the recipe, for example yamls/digits_medium.yaml; each further -f overrides those before it, for example "
        "yamls/hardware/8xa100.yaml",
    )  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="list the recipes and hardware profiles, one per line")
    mode.add_argument("--plan", action="store_true", help="print what the run will do and train nothing")
    mode.add_argument(
        "--probe", action="store_true", help="measure the run's phases for about a minute; predict its time and cost"
    )
    mode.add_argument(
        "--find-lr",
        action="store_true",
        help="raise the learning rate until training diverges; suggest a rate, with a plot",
    )
    mode.add_argument("--compare", action="store_true", help="train the recipe, then again with every speed-up off")
    parser.add_argument(
        "--ranks", type=_count, metavar="N", help="with --probe: predict the run on N ranks (default 1)"
    )
    parser.add_argument("--write-profile", metavar="FILE", help="with --probe: write a hardware profile to FILE")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of the recipe to set; algorithms.NAME=null turns an algorithm off",
    )
    return parser


def _limit_spinning() -> None:
    """Let a thread that waits for others spin for 0.7 ms before it sleeps, unless the environment says otherwise.

    libgomp's default is 10 times as long. On a machine with other work, a spinning thread keeps the core from the very
    thread that it waits for, which slows small networks by half and more. See docs/startup.md. libgomp reads this
    variable when torch is imported.
    """
    if not any(name in os.environ for name in _HOW_THREADS_WAIT):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _quiet_libraries() -> None:
    """Let through what a user can act on."""
    quiet_composer()
    # DDP, on channels-last 1x1 convolutions: their strides can be told in two ways that mean the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _complain(text: str, *, status: int = 2) -> int:
    if os.environ.get("RANK", "0") != "0":
        # Every rank finds the same mistake. The launcher reports the one that ends first, and ends the others: let that
        # be rank 0, whose output people see. A rank that is alone with its trouble speaks after this pause.
        time.sleep(_PAUSE_FOR_RANK_0_SECONDS)
    print(f"run.py: {text}", file=sys.stderr, flush=True)
    return status


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return (
            f"{error.filename or 'a file'} cannot be written: {error.strerror}. Make room or change what is in the "
            "way, and the same command with autoresume=true goes on from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"{error.filename or 'a file'} cannot be opened: {error.strerror}. Raise the limit (ulimit -n 65536), "
            "and the same command with autoresume=true goes on from the last checkpoint"
        )
    return str(error)


def _lost_worker(text: str) -> int:
    logging.getLogger(__name__).debug("raised here", exc_info=True)
    return _complain(
        f"{text} If memory is short, give fewer with data.train.num_workers=N, or none with "
        "data.train.loader=ffcv; the same command with autoresume=true goes on from the last checkpoint",
        status=1,
    )


def _lost_rank(error: RuntimeError) -> int:
    """Say that another rank is gone, if that is what `error` means; each machine says it for itself, at once."""
    from training.engines.ranks.peers import describe_lost_rank

    text = describe_lost_rank(error)
    if text is None:
        raise error
    print(f"run.py: {text}", file=sys.stderr, flush=True)
    return 1


def _stopped(options: argparse.Namespace, status: int = 130) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"run.py: stopped; {_what_is_left(options)}", file=sys.stderr, flush=True)
    return status


def _what_is_left(options: argparse.Namespace) -> str:
    recipe = getattr(options, "recipe", None)
    if options.probe or options.find_lr:
        return "nothing is written"
    if recipe is None or not any((recipe.run_dir / "checkpoints").glob("*.pt")):
        return "there is no checkpoint yet, so the same command begins anew"
    return "load=latest with the same command continues from the last checkpoint"
