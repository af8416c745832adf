"""What the benchmarks of our own loader share: the photos as .beton files, passes over them, and the machine."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_contenders import CROP_SCALE
from benchmarks.measuring import hardware, versions
from benchmarks.photos import make_photos
from data import FFCVLoader, write_beton
from data.sources import folder

DEFAULT_FOLDER = Path(".cache/brisk/benchmark_photos")
SIZES = (256, 500)  # of the tiers, px on the longer side
ALWAYS_LARGEST = 1e6  # as tier_headroom
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "scikit-image")


def parser(command: str, description: str, *, images: int, rounds: int) -> argparse.ArgumentParser:
    """With the settings that all of these benchmarks have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.loaders {command}", description=description)
    made.add_argument("--images", type=_count, default=images, help="of the set")
    made.add_argument("--workers", type=_count, default=2, help="threads that decode")
    made.add_argument("--rounds", type=_count, default=rounds, help="that count")
    made.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where sets are kept")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return made


def checked(made: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; a batch needs as many images as it holds."""
    options = made.parse_args(arguments)
    if options.images < options.batch_size:
        made.error(f"--images {options.images}: they do not fill a batch of {options.batch_size}; give more")
    return options


def tiered_file(cache_folder: Path, num_images: int, sizes: Sequence[int] = SIZES) -> Path:
    """The photos as a .beton file at `sizes`: those of 500 px are the JPEGs as they were, of 103 kB."""
    return _written(cache_folder, num_images, "-".join(map(str, sorted(sizes))), sizes=sizes)


def copied_file(cache_folder: Path, num_images: int, *, restart_rows: bool = False) -> Path:
    """The photos in one file, as they were unless they get restart markers."""
    name = "copied-restarts" if restart_rows else "copied"
    return _written(cache_folder, num_images, name, max_side_px=max(SIZES), restart_rows=restart_rows)


def encoded_file(cache_folder: Path, num_images: int, *, restart_rows: bool = False) -> Path:
    """The photos in one file at 499 px, all of them encoded at quality 90: 56 kB."""
    name = "encoded-restarts" if restart_rows else "encoded"
    return _written(cache_folder, num_images, name, max_side_px=max(SIZES) - 1, restart_rows=restart_rows)


def loader(path: Path, options: argparse.Namespace, *, image_size: int, **settings: Any) -> FFCVLoader:
    """A training loader with the crops of the other benchmarks."""
    common = {"per_device_batch_size": options.batch_size, "num_workers": options.workers, "crop_scale": CROP_SCALE}
    return FFCVLoader(path, image_size=image_size, train=True, **common, **settings)


def cpu_seconds() -> float:
    """User and system CPU-seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine(device: str = "cpu") -> dict[str, Any]:
    """Date, hardware, versions and load, for a report."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device(device)) | {"cores": os.cpu_count()},
        "versions": versions(LIBRARIES),
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(report: dict[str, Any]) -> str:
    """`machine` in one line."""
    where = report["hardware"]
    gpu = f", {where['gpu']}" if "gpu" in where else ""
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{where['cpu']}, {where['cores']} cores{gpu}, load average {report['load_average']}; {named}"


def carry_out(measure: Callable[[], dict[str, Any]], table: Callable[[dict[str, Any]], str], json_path: Any) -> None:
    """Measure, print the table, and write the figures if there is a path; what is missing ends it with status 2."""
    try:
        report = measure()
    except (OSError, ModuleNotFoundError, ValueError) as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(report))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")


def _written(cache_folder: Path, num_images: int, what: str, **settings: Any) -> Path:
    photos = make_photos(cache_folder, num_images)
    path = photos.folder.with_name(f"{photos.folder.name}-{what}.beton")
    if not path.is_file():
        write_beton(folder(photos.folder), path, write_mode="jpg", jpeg_quality=90, progress=False, **settings)
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)
