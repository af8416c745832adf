"""The command line of evaluate.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.command_line import add_judging_options, carry_out, device_here, joined_ranks, positive

_ABOUT = """\
Judge what a run has trained: accuracy, calibration, each class, the most confident mistakes, what shifting an image
changes, and accuracy at other image sizes. Figures, tables and pictures go to RUN/evaluation/."""

_EXAMPLES = """\
examples
  python evaluate.py results/digits_medium                        the run's best checkpoint on its evaluation split
  python evaluate.py results/digits_medium --sizes 16,20,24       and accuracy at other test sizes
  python evaluate.py results/digits_medium/checkpoints/latest.pt  another checkpoint
  python evaluate.py results/my_run --data other.beton --flip     other images of the same classes; with mirror images
  composer -n 8 evaluate.py results/my_run                        on eight devices; every image is seen once

Exit status: 0 done, 2 a mistake on the command line or in the files, 130 stopped with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return carry_out("evaluate.py", lambda: _evaluate(options))


def format_evaluation(measured: dict[str, Any]) -> str:
    """The main figures as aligned lines."""
    from training.results.text import align, format_loss, format_top1

    weights = ", averaged weights" if measured["averaged"] else ""
    shifts = measured["shift_consistency"]
    lines = [
        ("run", f"{measured['run_name']} ({measured['checkpoint']}{weights})"),
        ("images", f"{measured['images']:,} of {measured['split']}, {measured['classes']:,} classes"),
        ("top-1", format_top1(measured["top1"])),
        *([("top-5", format_top1(measured["top5"]))] if measured["top5"] is not None else []),
        ("balanced", f"{format_top1(measured['balanced'])}, the mean over the classes"),
        ("loss", format_loss(measured["loss"])),
        ("calibration", f"expected error {format_top1(measured['calibration_error'])}"),
        *([("shifts", f"{format_top1(shifts)} of pairs agree{_of_some(measured)}")] if shifts is not None else []),
    ]
    if len(measured["sizes"]) > 1:
        lines += [(f"{one['image_size']} px", f"top-1 {format_top1(one['top1'])}") for one in measured["sizes"]]
    for one in measured["worst_classes"][:3]:
        if one["mistaken_for"] is not None:
            taken = f"recall {format_top1(one['recall'])}, most often taken for {one['mistaken_for']}"
            lines.append(("worst class", f"{one['class']}: {taken}"))
    return align(lines)


def _evaluate(options: argparse.Namespace) -> int:
    from training.judging.evaluation import Question, evaluate, write_evaluation
    from training.trained import load_trained

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.data is not None and not options.data.exists():
        raise ValueError(
            f"--data is {options.data}, which is not there; give a .beton file or a folder of class folders"
        )
    device = device_here(options.device)
    trained = load_trained(options.run, trust_checkpoint=options.trust_checkpoint)
    folder = options.output or trained.run_dir / "evaluation"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made should not cost an evaluation
    question = Question(
        split=options.split, data=options.data, image_sizes=options.sizes, flip=options.flip,
        shifts=not options.no_shifts, cache_dir=options.cache_dir, num_workers=options.workers,
        per_device_batch_size=options.per_device_batch_size,
    )  # fmt: skip
    with joined_ranks(world_size, device):
        say = print if rank == 0 else _silent
        measured, found = evaluate(trained, question, device=device, rank=rank, world_size=world_size, say=say)
        if rank == 0:
            write_evaluation(measured, found, trained, folder)
            print(format_evaluation(measured))
            print(f"pictures and tables: {folder}/")
    return 0


def _of_some(measured: dict[str, Any]) -> str:
    every = measured["shifted_every"]
    return "" if every == 1 else f" (one image in {every})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_judging_options(parser)
    parser.add_argument(
        "--split",
        default="eval",
        choices=("eval", "test", "train"),
        help="which split of the recipe's data (default: eval)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="images instead of the recipe's: a .beton file, or a folder with a folder for each class",
    )
    parser.add_argument(
        "--sizes", type=_sizes, default=(), metavar="PX,PX", help="further image sizes to measure top-1 at"
    )
    parser.add_argument("--no-shifts", action="store_true", help="do not measure the consistency under shifts")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write (default: RUN/evaluation)")
    parser.add_argument("--workers", type=positive, metavar="N", help="loader workers (default: the recipe's)")
    parser.add_argument("--per-device-batch-size", type=positive, metavar="N", help="(default: the recipe's)")
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of converted data (default: the recipe's)")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _silent(text: str) -> None:
    """In place of print on ranks other than the first."""
