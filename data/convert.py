"""Command line: python -m data.convert SOURCE OUT.beton"""

from __future__ import annotations

import argparse
import ast
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from .beton.format import Beton, report_path, tier_path
from .beton.journal import writer_of
from .beton.write import WRITE_MODES, default_write_settings, with_sizes, write_beton
from .sources import SOURCES, SPLITS, FolderSource, build_source, odd_of
from .whole_files import BeingWrittenError, kept_path

_BY_SUFFIX = {".tar": "webdataset", ".parquet": "hf", ".arrow": "hf", ".csv": "csv", ".tsv": "csv"}
INTERRUPTED, TERMINATED = 130, 143  # exit statuses: 128 + SIGINT, SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, which leaves as little behind as Ctrl-C does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a source to a .beton file; returns the exit status: 0, 2 for a mistake that the message explains, 130
    for Ctrl-C, 143 for SIGTERM."""
    args = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # one per file, and bad files are reported anyway
    try:
        with _terminated_as_interrupted():
            _convert(args)
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted: {_what_is_left(args.out)}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BeingWrittenError as error:
        print(f"error: {error}{_by_whom(args.out)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_os_error(error, args.out)}", file=sys.stderr)
        return 2
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, which alone has handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _convert(args: argparse.Namespace) -> None:
    name, settings = _source(args)
    source = build_source(name, **settings)
    written_as = with_sizes(default_write_settings(name) | _given(args), args.sizes)
    print(f"{source.name}: {len(source)} images of {len(source.class_names)} classes", flush=True)
    if isinstance(source, FolderSource) and source.passed_over:
        print(f"{source.passed_over} files are no images by their names and are passed over", flush=True)
    if odd := odd_of(source):
        print(f"{len(odd)} images cannot be used, as {odd[0].where}: {odd[0].reason}", flush=True)
    start = time.perf_counter()
    path = write_beton(
        source,
        args.out,
        num_workers=args.workers,
        strict=args.strict,
        about={"built_from": name, "settings": settings},
        resumable=True,
        restart=args.restart,
        say=partial(print, flush=True),
        **written_as,
    )
    print(_summary(path, time.perf_counter() - start))


def _summary(path: Path, seconds: float) -> str:
    sidecar = Beton(path).sidecar
    num_images, stored = sidecar["num_samples"], sidecar["stored"]
    words = {
        "as it was": "JPEGs stored as they were",
        "with restarts": "JPEGs given restart markers",
        "jpeg": "encoded as JPEGs",
        "raw": "stored as pixels",
    }
    lines = [
        f"{path}: {num_images} images, {path.stat().st_size / 1e6:.1f} MB, in {seconds:.1f} s "
        f"({num_images / seconds:.0f} images/s); " + ", ".join(f"{stored[how]} {words[how]}" for how in sorted(stored))
    ]
    if sidecar["converted"]:
        lines.append("made RGB: " + ", ".join(f"{count} {kind}" for kind, count in sidecar["converted"].items()))
    if sidecar["left_out"]:
        lines.append(f"{sidecar['left_out']} images left out, listed with the reasons in {report_path(path)}")
    for size in sidecar.get("tiers", {}):
        tier = tier_path(path, size)
        lines.append(f"{tier}: the same images, up to {size} px, {tier.stat().st_size / 1e6:.1f} MB")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.convert",
        description="Write images to a .beton file for the FFCV loader. JPEGs that need no change are stored as they "
        "are. Images that cannot be used are left out and listed in OUT.report.txt. After Ctrl-C or a kill, the same "
        "command goes on where it was.",
        epilog=f"example: python -m {__package__}.convert /data/imagenet imagenet-train.beton --split train "
        "--max-side 500. Exit status: 0 done, 2 a mistake in what was asked or in the images, 130 or 143 stopped.",
    )
    parser.add_argument(
        "source",
        help="a folder with a folder for each class; a .tar (or shards-{000..012}.tar, or a URL), .parquet, "
        f".arrow or .csv file; or one of: {', '.join(sorted(SOURCES))}, with --set path=...",
    )
    parser.add_argument("out", type=Path, help="the file to write, usually ending in .beton")
    parser.add_argument(
        "--split", choices=SPLITS, help="which images; of a folder: its train/, its val/ (valid/, eval/), its test/"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the source; may be repeated"
    )
    parser.add_argument(
        "--write-mode",
        choices=WRITE_MODES,
        help="store pixels, JPEGs, or some of each (default: jpg for folders, raw for the others)",
    )
    parser.add_argument(
        "--jpeg-share", type=float, metavar="SHARE", help="store this share as JPEGs and the rest as pixels (0..1)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-side", type=int, metavar="PX", help="make larger images smaller (folders: 500; 0: never)")
    size.add_argument(
        "--sizes",
        type=_sizes,
        metavar="PX,PX",
        help="several of --max-side at once, as 256,500: OUT.beton has the largest, OUT.256.beton the other, for "
        "stages of small images",
    )
    parser.add_argument("--jpeg-quality", type=int, metavar="Q", help="of images that are encoded, 1..100 (default 90)")
    parser.add_argument(
        "--restart-rows",
        action="store_true",
        help="give JPEGs a restart marker after each row of blocks, so that the native decoder begins near a crop; "
        "pixels stay the same",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("--strict", action="store_true", help="end at the first image that cannot be used")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where an interrupted conversion to OUT would go on"
    )
    return parser


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write longest sides in px as 256,500") from None


def _source(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {"split": args.split} if args.split else {}
    for assignment in args.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: write it as KEY=VALUE")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    for suffix, name in _BY_SUFFIX.items():
        if args.source.endswith(suffix) and not Path(args.source).is_dir():
            return name, {"path": args.source} | settings
    # A name without such a folder is a source, or a misspelled one: build_source suggests the nearest.
    if args.source in SOURCES or not (Path(args.source).exists() or "/" in args.source):
        return args.source, settings
    return "folder", {"path": args.source} | settings


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {"write_mode": args.write_mode, "jpeg_share": args.jpeg_share, "jpeg_quality": args.jpeg_quality}
    given = {key: value for key, value in given.items() if value is not None}
    if args.restart_rows:
        given["restart_rows"] = True
    if args.jpeg_share is not None:
        if args.write_mode not in (None, "proportion"):
            raise ValueError(f"--jpeg-share and --write-mode {args.write_mode}: give one of them")
        given["write_mode"] = "proportion"
    return given if args.max_side is None else given | {"max_side_px": args.max_side or None}


def _by_whom(out: Path) -> str:
    writer = writer_of(out)
    return f" ({writer})" if writer else ""


def _what_is_left(out: Path) -> str:
    if kept_path(out).exists():
        return f"{out} is not complete; the same command goes on where this one was, --restart begins anew"
    return f"{out} was not written"


def _os_error(error: OSError, out: Path) -> str:
    if error.errno is None:  # raised in this package, with a full message
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{out} cannot be written: {error.strerror}{where}. Nothing was written; free space, or write elsewhere"


if __name__ == "__main__":
    raise SystemExit(main())
