"""Command line: python -m data.inspect FILE.beton - shows its contents, checks it, and draws what the model sees."""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .beton.format import Beton, report_path, sidecar_path, tier_path
from .decoding.decode import Decoder, make_decoder
from .prefetch import PrefetchIterator
from .whole_files import whole_file

_MOST_CLASSES = 20  # listed one by one
_BAR_CHARACTERS = 40
_SIZE_BINS_PX = (0, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096, 65536)
_VERIFIED_AT_ONCE = 64
_CAPTION_PX = 14
_SMALLEST_CELL_PX = 96


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a damaged file or a mistake, 130 for Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        beton = Beton(args.file)
        print(describe(beton))
        if args.verify:
            print(verify(beton, num_workers=args.workers))
        if args.sheet is not None:
            _save_sheet(args)
            print(f"{args.sheet}: images as they reach the model, before normalization")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def describe(beton: Beton) -> str:
    """The header, the sidecar, the classes with their counts, and the sizes, as text."""
    num_jpegs = int(beton.is_jpeg(np.arange(len(beton))).sum())
    lines = [
        f"{beton.path}: {len(beton):,} images of {len(beton.class_names)} classes, "
        f"{beton.path.stat().st_size / 1e6:,.1f} MB, {num_jpegs:,} as JPEGs and {len(beton) - num_jpegs:,} as pixels",
        "header, metadata and allocation table are whole",
    ]
    if beton.described:
        lines.append(f"sidecar {sidecar_path(beton.path)} describes this file")
        shown = ("source", "written_as", "stored", "converted", "left_out")
        lines += [f"  {key}: {_plain(beton.sidecar[key])}" for key in shown if beton.sidecar.get(key)]
        tiers = [tier_path(beton.path, int(size)) for size in beton.sidecar.get("tiers", {})]
        lines += [f"  smaller images: {tier}, {_megabytes(tier)}" for tier in tiers]
        if report_path(beton.path).is_file():
            lines.append(f"  images left out are listed in {report_path(beton.path)}")
    else:
        lines.append("no sidecar: classes have numbers for names, mean and std are ImageNet's")
    for name, values in (("mean", beton.mean), ("std", beton.std)):
        lines.append(f"  {name}: {', '.join(f'{value:.2f}' for value in values)} (red, green, blue of 0..255)")
    return "\n".join([*lines, *_classes(beton), *_sizes(beton)])


def verify(beton: Beton, *, num_workers: int = 2) -> str:
    """Decode every image and compare the bytes with the sidecar's checksum; returns a one-line report.

    Raises:
        ValueError: images are damaged, or are not the sidecar's.
        ModuleNotFoundError: no decoder is installed.
    """
    decoder = make_decoder()
    indices = np.arange(len(beton))
    groups = np.array_split(indices, -(-len(indices) // _VERIFIED_AT_ONCE))
    tasks = (partial(_damaged, decoder, beton, group) for group in groups)
    damaged = [index for found in PrefetchIterator(tasks, num_workers=num_workers) for index in found]
    if damaged:
        some = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        raise ValueError(f"{len(damaged)} images of {beton.path} are damaged: {some}; convert the images again")
    expected = beton.sidecar.get("images_checksum")
    if expected is None:
        return f"all {len(beton):,} images decode; there is no checksum to compare them with"
    checksum = 0
    for index in indices:
        checksum = zlib.crc32(beton.image_bytes(int(index)).data, checksum)
    if checksum != expected:
        raise ValueError(
            f"the images of {beton.path} decode, but are not those that {sidecar_path(beton.path)} describes: checksum "
            f"{checksum} instead of {expected}; convert the images again"
        )
    return f"all {len(beton):,} images decode and have the sidecar's checksum"


def contact_sheet(images: np.ndarray, captions: Sequence[str], *, columns: int) -> Any:
    """A Pillow image of uint8 [N, S, S, 3] in rows of `columns`, each over its caption; small ones are enlarged."""
    from PIL import Image, ImageDraw

    zoom = max(1, -(-_SMALLEST_CELL_PX // images.shape[1]))
    cell = images.shape[1] * zoom
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + _CAPTION_PX + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % columns * (cell + 4) + 2, place // columns * (cell + _CAPTION_PX + 4) + 2
        sheet.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        while draw.textlength(caption) > cell:
            caption = caption[:-2] + "." if len(caption) > 2 else ""
        draw.text((left, top + cell), caption, fill=(0, 0, 0))
    return sheet


def _save_sheet(args: argparse.Namespace) -> None:
    from .loading.ffcv_loader import FFCVLoader

    loader = FFCVLoader(
        args.file,
        per_device_batch_size=1,
        image_size=args.image_size,
        train=not args.eval,
        seed=args.seed,
        num_workers=0,
        crop_scale=tuple(args.crop_scale),
        flip=args.flip,
        flip_probability=args.flip_probability,
        eval_crop_ratio=args.crop_ratio,
        augmentations=_augmentations(args.augmentations),
    )
    loader.set_batch_size(min(args.rows * args.columns, loader.num_samples))
    images, labels = next(iter(loader))
    names = [loader.class_names[label] for label in labels.tolist()]
    sheet = contact_sheet(images.permute(0, 2, 3, 1).contiguous().numpy(), names, columns=args.columns)
    with whole_file(args.sheet) as file:
        sheet.save(file, format="PNG")


def _augmentations(text: str) -> list[Any]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f'--augmentations {text}: give JSON, as [{{"name": "cutout"}}] ({error})') from error
    if not isinstance(entries, list):
        raise ValueError(f'--augmentations {text}: give a list, as [{{"name": "cutout"}}]')
    return entries


def _damaged(decoder: Decoder, beton: Beton, indices: np.ndarray) -> list[int]:
    def decodes(some: np.ndarray) -> bool:
        height, width = beton.heights[some], beton.widths[some]
        whole = np.stack([0 * height, 0 * height, height, width, 0 * height], axis=1).astype(np.int32)
        try:
            decoder.decode(beton, some, whole, np.empty((len(some), 32, 32, 3), dtype=np.uint8), exact=False)
        except ValueError:
            return False
        return True

    return [] if decodes(indices) else [int(i) for i in indices if not decodes(np.array([i]))]


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "which is not there"


def _classes(beton: Beton) -> list[str]:
    counts = np.bincount(beton.labels, minlength=len(beton.class_names))
    lines = [f"classes: {counts.min():,} to {counts.max():,} images each, {np.median(counts):,.0f} in the median"]
    shown = range(min(len(counts), _MOST_CLASSES))
    width = max(len(beton.class_names[label]) for label in shown)
    lines += [f"  {label:>4} {beton.class_names[label]:<{width}} {counts[label]:>9,}" for label in shown]
    if len(counts) > _MOST_CLASSES:
        lines.append(f"  and {len(counts) - _MOST_CLASSES} more")
    return lines


def _sizes(beton: Beton) -> list[str]:
    lines = [
        f"{name}: {values.min()} to {values.max()} px, {np.median(values):.0f} in the median"
        for name, values in (("heights", beton.heights), ("widths", beton.widths))
    ]
    counts, edges = np.histogram(np.maximum(beton.heights, beton.widths), _SIZE_BINS_PX)
    lines.append("longer side, px:")
    for count, least, most in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            bar = "#" * max(1, round(_BAR_CHARACTERS * count / counts.max()))
            lines.append(f"  {least:>5} to {most - 1:<5} {count:>9,} {bar}")
    return lines


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {_plain(v)}" for key, v in value.items()) if isinstance(value, dict) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.inspect",
        description="Show what a .beton file holds, and check it.",
        epilog=f"example: python -m {__package__}.inspect train.beton --verify --sheet sheet.png",
    )
    parser.add_argument("file", type=Path, help="the .beton file")
    parser.add_argument("--verify", action="store_true", help="decode every image and compare its checksum")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that verify (default 2)")
    sheet = parser.add_argument_group("contact sheet", "a picture of the first batch, as the network would see it")
    sheet.add_argument("--sheet", type=Path, metavar="PNG", help="write the images to this file")
    sheet.add_argument("--rows", type=int, default=4, metavar="N", help="(default 4)")
    sheet.add_argument("--columns", type=int, default=6, metavar="N", help="(default 6)")
    sheet.add_argument("--image-size", type=int, default=224, metavar="PX", help="(default 224)")
    sheet.add_argument("--eval", action="store_true", help="an evaluation batch instead of a training batch")
    sheet.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of training's order, crops and flips (default 0)"
    )
    sheet.add_argument(
        "--crop-scale", type=float, nargs=2, default=(0.08, 1.0), metavar=("LEAST", "LARGEST"),
        help="in training: share of the image's area (default 0.08 1)",
    )  # fmt: skip
    sheet.add_argument(
        "--crop-ratio", type=float, default=0.875, metavar="R",
        help="in evaluation: the crop's side over the image's short side (default 0.875)",
    )  # fmt: skip
    sheet.add_argument("--flip", default="random", metavar="HOW", help="random, alternating or none (default random)")
    sheet.add_argument("--flip-probability", type=float, default=0.5, metavar="P", help="in training (default 0.5)")
    sheet.add_argument(
        "--augmentations",
        default="[]",
        metavar="JSON",
        help='in training, for example [{"name": "color_jitter", "hue": 0.1}]',
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
