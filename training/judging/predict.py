"""The command line of predict.py."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from training.command_line import add_judging_options, carry_out, device_here, positive

if TYPE_CHECKING:
    from torch import Tensor

    from training.judging.predicting import Network
    from training.trained import Trained

_ABOUT = """\
Classify pictures with a trained run: the most probable classes of each, as CSV or JSON lines."""

_EXAMPLES = """\
examples
  python predict.py results/my_run cat.jpg dog.png                one line per picture
  python predict.py results/my_run photos/ --json > found.jsonl   every picture in a folder and below
  find photos -name '*.jpg' | python predict.py results/my_run -  names from stdin

CSV has the columns image, class_1, probability_1, class_2 ... A picture that cannot be read is named on stderr.
Exit status: 0 done, 1 some pictures could not be read, 2 a mistake on the command line or in the files, 130
stopped with Ctrl-C."""

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Classes = list[tuple[str, float]]  # the most probable first, with their probabilities


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return carry_out("predict.py", lambda: _predict(options))


def _predict(options: argparse.Namespace) -> int:
    names = list(_names(options.images))
    if not names:
        raise ValueError(
            f"there is no picture in {', '.join(options.images)}; give files, folders that have some, or -"
        )
    from training.judging.predicting import Network
    from training.trained import load_trained

    device = device_here(options.device)
    trained = load_trained(options.run, trust_checkpoint=options.trust_checkpoint)
    network = Network(trained, device=device, flip=options.flip)
    top = min(options.top, len(trained.class_names))
    write = _json_writer(sys.stdout) if options.json else _csv_writer(sys.stdout, top)
    readable, unreadable = _readable(names, trained), 0
    while batch := list(islice(readable, options.batch_size)):
        seen = [(name, pixels) for name, pixels in batch if pixels is not None]
        unreadable += len(batch) - len(seen)
        for (name, _), classes in zip(seen, classify(network, trained, [p for _, p in seen], top=top), strict=True):
            write(name, classes)
    return 1 if unreadable else 0


def classify(network: Network, trained: Trained, pixels: Sequence[Tensor], *, top: int) -> list[Classes]:
    """The `top` most probable classes of each of the uint8 images [3, S, S]."""
    import torch

    from training.judging.metrics import probabilities

    if not pixels:
        return []
    best = probabilities(network(torch.stack(list(pixels))), loss=network.loss).topk(top)
    return [
        [(trained.class_names[index], value) for index, value in zip(indices, values, strict=True)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _names(given: Sequence[str]) -> Iterator[Path]:
    """The pictures that the command line names: files as they are, folders' files by their suffix, stdin's lines."""
    for one in given:
        path = Path(one)
        if one == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        elif path.exists():
            yield path
        else:
            raise ValueError(f"{one} is not there; give files, folders, or - for names on stdin")


def _readable(names: Sequence[Path], trained: Trained) -> Iterator[tuple[Path, Tensor | None]]:
    """Each name with its pixels as the network takes them, or with None after telling why not."""
    from data import read_image

    for name in names:
        try:
            pixels = trained.preprocessing.pixels(read_image(name.read_bytes()))
        except (OSError, ValueError) as error:  # UnusableImage is a ValueError
            reason = error.strerror if isinstance(error, OSError) else str(error)
            print(f"predict.py: {name} cannot be read: {reason}", file=sys.stderr)
            pixels = None
        yield name, pixels


def _csv_writer(file: TextIO, top: int) -> Callable[[Path, Classes], None]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["image", *(f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability"))])

    def write(name: Path, classes: Classes) -> None:
        rows.writerow([name, *(cell for label, value in classes for cell in (label, f"{value:.6f}"))])

    return write


def _json_writer(file: TextIO) -> Callable[[Path, Classes], None]:
    def write(name: Path, classes: Classes) -> None:
        top = [{"class": label, "probability": round(value, 6)} for label, value in classes]
        file.write(json.dumps({"image": str(name), "top": top}, ensure_ascii=False) + "\n")

    return write


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_judging_options(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for names on stdin")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of CSV")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes per picture (default: 5)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pictures at a time (default: 64)")
    return parser
