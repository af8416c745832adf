"""How many cores a GPU needs at each image size: its images/s times the loader's CPU-seconds per image.

    python -m benchmarks.loaders --cores --json cores.json

The CPU-seconds are measured here, from one file at 500 px and from tiers of 256 and 500 px. The GPUs' images/s are
published ones of ResNet-50 at 224 px; at another size they are taken to go with the multiply-adds, which flatters the
GPU at small sizes, where its kernels are less full: the figures are upper bounds there. Cores are those of the CPU that
the table names, each without a second thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.loading import files
from benchmarks.loading.tiers import cpu_seconds_by_size
from benchmarks.measuring import columns, progress

# images/s of training ResNet-50 at 224 px on one GPU.
GPUS = {
    "A100, PyTorch": 2500,  # 2,470 to 2,600 in published runs
    "H100, goal": 3200,  # what this project aims at
    "H100, MLPerf": 7160,  # the best published rate of a node of 8, per GPU
}
# Multiply-adds of ResNet-50's forward pass, in thousand millions, by image size.
GMACS = {128: 1.34, 160: 2.09, 176: 2.61, 192: 3.01, 224: 4.09, 256: 5.34, 288: 6.76}


def main(arguments: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = files.parser("--cores", (__doc__ or "").split("\n")[0], images=2000, rounds=6)
    parser.add_argument("--cores", action="store_true", help="this benchmark")
    parser.add_argument("--image-sizes", type=int, nargs="+", choices=GMACS, default=list(GMACS), metavar="PX")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    options = files.checked(parser, arguments)
    files.carry_out(lambda: measure(options), table, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One report."""
    progress(f"making {options.images} images")
    paths = files.tiered_file(options.folder, options.images), files.encoded_file(options.folder, options.images)
    return {
        **files.machine(),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "folder")},
        "rows": cpu_seconds_by_size(options, *paths),
    }


def cores(cpu_seconds_per_1000: float, images_per_second_at_224: float, image_size: int) -> float:
    """Cores that feed a GPU of this pace at `image_size` px."""
    images_per_second = images_per_second_at_224 * GMACS[224] / GMACS[image_size]
    return images_per_second * cpu_seconds_per_1000 / 1000


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["px", "file", "CPU-s/1,000", *(f"{name}: {rate:,}/s" for name, rate in GPUS.items())]]
    for row in report["rows"]:
        cost, px = row["cpu_seconds_per_1000"]["median"], row["image_size"]
        needed = (f"{cores(cost, rate, px):.1f}" for rate in GPUS.values())
        lines.append([str(px), row["contender"], f"{cost:.3f}", *needed])
    notes = f"{report['date']}, n = {report['settings']['rounds']} rounds; {files.machine_line(report)}"
    return f"{columns(lines)}\n\n{notes}"
