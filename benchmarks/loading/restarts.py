"""What restart markers save: the decoder's CPU time per crop, and bytes, beside the same images without them.

    python -m benchmarks.loaders --restarts --json restarts.json

Two files of the photos: "copied" at 500 px, JPEGs as they were, and "encoded" at 499 px. Each is compared with a
conversion with --restart-rows. In every round each decodes the same crops of one batch, in random order, on one thread,
and restart markers must not change the pixels. Ratios are of the same round.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.loading import files
from benchmarks.measuring import columns, progress, spread
from data.beton.format import Beton
from data.decoding.crops import CropSettings
from data.decoding.native_decode import NativeDecoder

LEAST_AREAS = (0.08, 0.35)  # of a crop, over the image's: the default, and that of the other benchmarks


def main(arguments: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = files.parser("--restarts", (__doc__ or "").split("\n")[0], images=400, rounds=60)
    parser.add_argument("--restarts", action="store_true", help="this benchmark")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[128, 224], metavar="PX")
    parser.add_argument("--batch-size", type=int, default=32, help="images")
    options = files.checked(parser, arguments)
    files.carry_out(lambda: measure(options), table, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One report."""
    progress(f"making {options.images} images")
    made = {"copied": files.copied_file, "encoded": files.encoded_file}
    betons = {
        (name, restarts): Beton(make(options.folder, options.images, restart_rows=restarts))
        for name, make in made.items()
        for restarts in (False, True)
    }
    rows = [row for px in options.image_sizes for area in LEAST_AREAS for row in decoding(betons, px, area, options)]
    progress("")
    return {
        **files.machine(),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "folder")},
        "rows": rows,
        "bytes_per_image": {name: [_mean_bytes(betons[name, r]) for r in (False, True)] for name in made},
    }


def decoding(
    betons: dict[tuple[str, bool], Beton], px: int, least_area: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Microseconds of CPU time per image and file, and the ratios with restart markers to without."""
    decoder, order, crops = NativeDecoder(), random.Random(0), CropSettings(scale=(least_area, 1.0))
    spent: dict[tuple[str, bool], list[float]] = {which: [] for which in betons}
    out = {which: np.empty((options.batch_size, px, px, 3), dtype=np.uint8) for which in betons}
    for number in range(-1, options.rounds):  # the first one warms up
        progress(f"{px} px, crops of {least_area} to 1: round {number + 1} of {options.rounds}")
        indices = np.random.default_rng(number + 1).permutation(options.images)[: options.batch_size]
        for which in order.sample(list(betons), len(betons)):
            beton = betons[which]
            heights, widths = beton.heights[indices], beton.widths[indices]
            rows = crops.rows(indices, heights, widths, seed=0, epoch=number + 1, augment=True)
            begin = time.thread_time()
            decoder.decode(beton, indices, rows, out[which], exact=False)
            if number >= 0:
                spent[which].append((time.thread_time() - begin) / len(indices) * 1e6)
        for name in {name for name, _ in betons}:
            if not np.array_equal(out[name, False], out[name, True]):
                raise AssertionError(f"{name}: restart markers change the pixels")
    return [
        {
            "file": name,
            "image_size": px,
            "least_area": least_area,
            "microseconds": [spread(spent[name, restarts]) for restarts in (False, True)],
            "ratio": spread([a / b for a, b in zip(spent[name, True], spent[name, False], strict=True)]),
        }
        for name in sorted({name for name, _ in betons})
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["px", "crops of", "file", "us an image", "with restarts", "ratio", "95 %"]]
    for row in report["rows"]:
        (without, restarts), ratio = row["microseconds"], row["ratio"]
        lines.append(
            [
                str(row["image_size"]), f"{row['least_area']} to 1", row["file"], f"{without['median']:.0f}",
                f"{restarts['median']:.0f}", f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            ]
        )  # fmt: skip
    stored = [
        f"{name}: {without / 1000:.1f} kB an image, with restarts {restarts / without:.3f} of it"
        for name, (without, restarts) in report["bytes_per_image"].items()
    ]
    return "\n\n".join([columns(lines), "\n".join([*stored, files.machine_line(report)])])


def _mean_bytes(beton: Beton) -> float:
    return float(beton.num_bytes(np.arange(len(beton))).mean())
