"""Command line: python -m data.convert SOURCE OUT.beton"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.build import default_write_settings
from data.sources import SOURCES, build_source
from data.write import write_beton


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a source to a .beton file; returns the exit status: 0, or 2 for a mistake that the message explains."""
    args = _parser().parse_args(arguments)
    try:
        name, settings = _source(args)
        source = build_source(name, **settings)
        written_as = default_write_settings(name) | _given(args)
        print(f"{source.name}: {len(source)} images of {len(source.class_names)} classes", flush=True)
        path = write_beton(
            source, args.out, num_workers=args.workers, about={"built_from": name, "settings": settings}, **written_as
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, description in {path}.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.convert",
        description="Write images to a .beton file for the FFCV loader.",
        epilog="example: python -m data.convert /data/imagenet imagenet-train.beton --split train --max-side 500",
    )
    parser.add_argument("source", help=f"a folder with one folder a class, or one of: {', '.join(sorted(SOURCES))}")
    parser.add_argument("out", type=Path, help="the file to write, usually ending in .beton")
    parser.add_argument(
        "--split", choices=("train", "eval"), help="of a folder: its train/, or its val/ (eval/, test/)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the source")
    parser.add_argument("--write-mode", choices=("raw", "jpg"), help="default: jpg for folders, raw for the others")
    parser.add_argument(
        "--max-side", type=int, metavar="PX", help="make larger images smaller (folders: 500; 0: never)"
    )
    parser.add_argument("--jpeg-quality", type=int, metavar="Q", help="1..100 (default 90)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default 2)")
    return parser


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
    # A name without a folder behind it is a source, or a misspelled one: build_source answers with the nearest.
    if args.source in SOURCES or not (Path(args.source).exists() or "/" in args.source):
        return args.source, settings
    return "folder", {"path": args.source} | settings


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {"write_mode": args.write_mode, "jpeg_quality": args.jpeg_quality}
    given = {key: value for key, value in given.items() if value is not None}
    return given if args.max_side is None else given | {"max_side_px": args.max_side or None}


if __name__ == "__main__":
    raise SystemExit(main())
