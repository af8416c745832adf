"""What a smaller copy of the data saves: CPU-seconds, bytes, and how far its pixels are from the large file's.

    python -m benchmarks.loaders --tiers --json tiers.json

Three files hold the same photos: "single" at 500 px (JPEGs as they were), "encoded" at 499 px (all encoded at quality
90), and the tiers of 256 and 500 px, of which the loader takes the one that serves the size. In
every round each makes a pass at each size, in random order, in one process. Ratios are of passes of the same round.

Pixels are compared crop by crop at the same seed and epoch: the tier's with the single file's, and both with the single
file's decoded at full size. Crops that rounding made another one in the tier (see docs/data.md) are counted and left
out of the comparison.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_contenders import CROP_SCALE
from benchmarks.loading import files
from benchmarks.measuring import columns, progress, spread, verdict
from benchmarks.photos import make_photos
from data.beton.format import Beton
from data.beton.tiers import Tiers
from data.beton.write import write_beton
from data.decoding.crops import CropSettings
from data.decoding.decode import make_decoder
from data.sources import folder

CONTENDERS = ("single", "encoded", "tiers")
GOAL, GOAL_PX = 0.6, 128  # the tiers' CPU-seconds over the single file's
_COMPARED = 500  # images
_ANOTHER_CROP_PX = 2  # an edge further off than rounding explains


def main(arguments: Sequence[str]) -> None:
    """Measure and print the tables."""
    parser = files.parser("--tiers", (__doc__ or "").split("\n")[0], images=2000, rounds=6)
    parser.add_argument("--tiers", action="store_true", help="this benchmark")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(files.SIZES), metavar="PX", help="of the tiers")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[96, 128, 160, 192, 224], metavar="PX")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    options = files.checked(parser, arguments)
    files.carry_out(lambda: measure(options), table, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One report."""
    progress(f"making {options.images} images")
    tiered = files.tiered_file(options.folder, options.images, options.sizes)
    encoded = files.encoded_file(options.folder, options.images)
    rows = cpu_seconds_by_size(options, tiered, encoded)
    return {
        **files.machine(),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "folder")},
        "rows": rows,
        "stored_bytes_per_image": {
            one.path.name: int(one.num_bytes(np.arange(len(one))).sum()) / len(one)
            for one in [*Tiers(tiered).all, Beton(encoded)]
        },
        "conversion": conversion(make_photos(options.folder, options.images).folder, options),
        "pixels": compare_pixels(tiered, GOAL_PX, min(_COMPARED, options.images)),
    }


def cpu_seconds_by_size(options: argparse.Namespace, tiered: Path, encoded: Path) -> list[dict[str, Any]]:
    """Each contender's CPU-seconds per 1,000 images at each size, and the ratios to the single file's."""
    loaders = {
        "single": files.loader(tiered, options, image_size=1, tier_headroom=files.ALWAYS_LARGEST),
        "encoded": files.loader(encoded, options, image_size=1),
        "tiers": files.loader(tiered, options, image_size=1),
    }
    found: dict[tuple[str, int], list[float]] = {(name, px): [] for name in loaders for px in options.image_sizes}
    order = random.Random(0)
    for number in range(-1, options.rounds):  # the first one warms up
        progress(f"round {number + 1} of {options.rounds}")
        for px in order.sample(options.image_sizes, len(options.image_sizes)):
            for name in order.sample(CONTENDERS, len(CONTENDERS)):
                loaders[name].set_image_size(px)
                loaders[name].set_position(number + 1)
                begin = files.cpu_seconds()
                images = sum(len(labels) for _, labels in loaders[name])
                if number >= 0:
                    found[name, px].append((files.cpu_seconds() - begin) / images * 1000)
    progress("")
    return [
        {
            "contender": name,
            "image_size": px,
            "file": loaders[name].file_for(px).name,
            "cpu_seconds_per_1000": spread(found[name, px]),
            "ratio_to_single": spread([a / b for a, b in zip(found[name, px], found["single", px], strict=True)]),
        }
        for px in options.image_sizes
        for name in CONTENDERS
    ]


def conversion(photos: Path, options: argparse.Namespace) -> dict[str, Any]:
    """CPU-seconds per 1,000 images of a conversion at 500 px, and at both sizes at once."""
    found: dict[str, list[float]] = {"single": [], "tiers": []}
    with tempfile.TemporaryDirectory(dir=photos.parent) as place:
        for number in range(3):
            for name, sizes in (("single", [max(options.sizes)]), ("tiers", options.sizes)):
                begin = files.cpu_seconds()
                out = Path(place, f"{name}{number}.beton")
                write_beton(folder(photos), out, write_mode="jpg", sizes=sizes, progress=False)
                found[name].append((files.cpu_seconds() - begin) / options.images * 1000)
                for path in Path(place).iterdir():
                    os.unlink(path)
    return {name: spread(values) for name, values in found.items()}


def compare_pixels(path: Path, image_size: int, num_images: int) -> dict[str, Any]:
    """Differences between the crops of a tier and those of the single file, in levels of 255 and dB."""
    crops, decoder, indices = CropSettings(scale=CROP_SCALE), make_decoder(), np.arange(num_images)
    tiers = Tiers(path)
    small = tiers.serving(image_size, crops, augment=True)

    def decoded(beton: Beton, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        heights, widths = beton.heights[indices], beton.widths[indices]
        rows = crops.rows(indices, heights, widths, seed=0, epoch=0, augment=True)
        out = np.empty((num_images, image_size, image_size, 3), dtype=np.uint8)
        decoder.decode(beton, indices, rows, out, exact=exact)
        edges = np.stack([rows[:, 0], rows[:, 1], rows[:, 0] + rows[:, 2], rows[:, 1] + rows[:, 3]], axis=1)
        return out, edges / np.stack([heights, widths, heights, widths], axis=1)

    (ours, edges), (single, single_edges), (exact, _) = (
        decoded(small, exact=False), decoded(tiers.largest, exact=False), decoded(tiers.largest, exact=True)
    )  # fmt: skip
    shorter = np.minimum(small.heights, small.widths)[indices]
    same = np.abs(edges - single_edges).max(axis=1) * shorter <= _ANOTHER_CROP_PX
    pairs = {"tier and single": (ours, single), "tier and exact": (ours, exact), "single and exact": (single, exact)}
    return {
        "image_size": image_size,
        "file": small.path.name,
        "images": num_images,
        "another_crop": int((~same).sum()),
        "differences": {what: difference(a[same], b[same]) for what, (a, b) in pairs.items()},
    }


def difference(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Mean absolute difference in levels, and the PSNR in dB of all pixels together, of uint8 images."""
    levels = left.astype(np.float64) - right
    error = float((levels**2).mean())
    psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
    return {"mean_absolute": float(np.abs(levels).mean()), "psnr_db": psnr}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["px", "file", "CPU-s/1,000", "95 %", "over single", "95 %", "reads"]]
    for row in report["rows"]:
        cost, ratio = row["cpu_seconds_per_1000"], row["ratio_to_single"]
        lines.append(
            [
                str(row["image_size"]), row["contender"], f"{cost['median']:.3f}",
                f"{cost['low']:.3f} to {cost['high']:.3f}", f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}", row["file"],
            ]
        )  # fmt: skip
    pixels, converted = report["pixels"], report["conversion"]
    compared = [["crops at 128 px", "mean absolute difference", "PSNR, dB"]]
    for what, values in pixels["differences"].items():
        compared.append([what, f"{values['mean_absolute']:.2f}", f"{values['psnr_db']:.1f}"])
    notes = [
        *(f"{name}: {size / 1000:.1f} kB an image" for name, size in report["stored_bytes_per_image"].items()),
        f"conversion, CPU-s per 1,000 images: {converted['single']['median']:.2f} at the largest size alone, "
        f"{converted['tiers']['median']:.2f} at all",
        f"{pixels['another_crop']} of {pixels['images']} crops are another one in the tier",
        *_verdicts(report),
        f"{report['date']}, n = {report['settings']['rounds']} rounds; {files.machine_line(report)}",
    ]
    return "\n\n".join([columns(lines), columns(compared), "\n".join(notes)])


def _verdicts(report: dict[str, Any]) -> list[str]:
    return [
        f"{verdict(row['ratio_to_single'], GOAL)}: CPU-seconds at {GOAL_PX} px over the single file's; "
        f"goal at most {GOAL}"
        for row in report["rows"]
        if row["contender"] == "tiers" and row["image_size"] == GOAL_PX
    ]
