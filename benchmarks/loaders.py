"""The cost of each loader: CPU-seconds per 1,000 training images, ours and other libraries', in one run.

    python -m benchmarks.loaders                                       # from the checkout; needs the extra "bench"
    python -m benchmarks.loaders --quick --only ours torchvision
    python -m benchmarks.loaders --least-area 0.08                     # the loaders' default crops
    python -m benchmarks.loaders --json loaders.json --chart loaders.png
    python -m benchmarks.loaders --read loaders.json --chart loaders.png

    python -m benchmarks.loaders --tiers                               # our loader alone, from files of several sizes
    python -m benchmarks.loaders --restarts                            # our decoder, from files with restart markers
    python -m benchmarks.loaders --device cuda                         # into a GPU's memory, beside training steps
    python -m benchmarks.loaders --ahead                               # how many batches ahead suffice
    python -m benchmarks.loaders --cores                               # how many cores a GPU needs

The last five are described in benchmarks/loading; `--help` after each lists its settings.

The images are JPEGs of 90 to 130 kB and about 500x400 px, cut from the photos that scikit-learn and scikit-image ship
(benchmarks/photos.py). FFCV's own writer makes a .beton file of them at quality 90, which FFCV's loader and this
package's both read; the others read the JPEGs. All crop at random (scale 0.35 to 1, or from --least-area on), flip, and
return uint8 batches.

Every contender runs in its own process. Each is first started several times, alone, to measure the time to its first
batch; the last process stays for the whole run. Then every round requests a pass at each size, with sizes and
contenders in a new random order. A ratio divides two passes of the same round and size. The report gives medians over
rounds; a goal is met or missed if the median's 95 % confidence interval lies on one side of it, and otherwise open.

CPU-seconds are user and system time of a contender's process and its children, so other processes cannot add to them,
though they can slow memory down. Memory is the peak of what is not mapped from a file, each page counted once. A
contender that cannot be imported, crashes or does not answer in time is reported and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender_process import ContenderError, ContenderProcess
from benchmarks.loader_contenders import CONTENDERS, CROP_SCALE, Job
from benchmarks.measuring import columns, hardware, progress, spread, verdict, versions
from benchmarks.photos import make_beton, make_photos

TITLES = {
    "ours": "FFCVLoader, native decoder",
    "ours_libffcv": "FFCVLoader, libffcv",
    "ffcv": "FFCV",
    "torchvision": "torchvision, PIL",
    "torchvision_v2": "torchvision, decode_jpeg and v2",
    "dali": "DALI on the CPU",
    "limit_crop": "limit: crop decoded, not resized",
    "limit_entropy": "limit: entropy decoding alone",
}
OURS, REFERENCE = "ours", "ffcv"
GOALS = {"ffcv": 0.55, "torchvision": 0.3}  # our CPU-seconds over theirs, at every size
GOAL_MEMORY = 1.0  # our memory over FFCV's
GOAL_FIRST_BATCH_SECONDS = 2.0
GOAL_TURNAROUND_SECONDS = 0.2
LIBRARIES = ("torch", "torchvision", "ffcv", "nvidia-dali-cuda120", "pillow", "opencv-python", "numpy", "scikit-image")
COUNTS = ("images", "batch_size", "workers", "rounds", "starts", "timeout")  # settings that must be above 0
DEFAULT_FOLDER = Path(".cache/brisk/benchmark_photos")
# Benchmarks of our own loader, by the option that asks for them.
OTHERS = {"--tiers": "tiers", "--restarts": "restarts", "--device": "pace", "--ahead": "ahead", "--cores": "cores"}


@dataclass
class Row:
    """A contender's passes at one image size, one per round."""

    contender: str
    image_size: int
    cpu_seconds: list[float] = field(default_factory=list)  # per 1,000 images
    images_per_second: list[float] = field(default_factory=list)
    turnaround_seconds: list[float] = field(default_factory=list)  # of the passes with a new size
    memory_mib: list[float | None] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read earlier measurements; print the table, and write the requested files."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for asked, module in OTHERS.items():
        if any(one.partition("=")[0] == asked for one in arguments):
            importlib.import_module(f"benchmarks.loading.{module}").main(arguments)
            return
    options = parse(arguments)
    try:
        report = measured_report(options) if options.read is None else json.loads(options.read.read_text())
    except (OSError, ModuleNotFoundError) as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.chart is not None:
        draw_chart(report, options.chart)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=2000, help="of the set")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[128, 160, 176, 224], metavar="PX")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of a contender")
    parser.add_argument(
        "--least-area",
        type=float,
        default=CROP_SCALE[0],
        metavar="SHARE",
        help="of a crop, over the image's: above 0, to 1",
    )
    parser.add_argument("--rounds", type=int, default=6, help="passes at each size that count")
    parser.add_argument("--starts", type=int, default=3, help="of each contender, for the time to its first batch")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a pass may take, a start included")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where sets are kept")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--quick", action="store_true", help="150 images at 224 px, one round, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the CPU-seconds there; needs matplotlib")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing, take the figures of --json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.image_sizes, options.rounds, options.starts = 150, [224], 1, 1
    numbers = {
        name: getattr(options, name) for name in ("images", "batch_size", "workers", "rounds", "starts", "timeout")
    }
    for name, value in (numbers | {"image_sizes": min(options.image_sizes)}).items():
        if value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if not 0 < options.least_area <= 1:
        parser.error(f"--least-area {options.least_area}: give a number above 0 and up to 1")
    if options.images < options.batch_size:
        parser.error(
            f"--images {options.images}: they do not fill a batch of {options.batch_size}; give more, "
            "or a smaller --batch-size"
        )
    if options.read is not None and not options.read.is_file():
        parser.error(f"--read {options.read}: there is no such file; write it with --json")
    if options.chart is not None and find_spec("matplotlib") is None:
        parser.error(f"--chart {options.chart}: it needs matplotlib; install that, or leave this out")
    for name, path in (("json", options.json), ("chart", options.chart)):
        if path is not None and (path.is_dir() or not _is_writable(path.parent)):
            parser.error(f"--{name} {path}: no file can be written there; give another path")
    return options


def _is_writable(folder: Path) -> bool:
    # Tried, since permissions do not reveal a read-only file system.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def measured_report(options: argparse.Namespace) -> dict[str, Any]:
    """Make the images, measure every contender, and return one report."""
    progress(f"making {options.images} images")
    photos = make_photos(options.folder, options.images)
    if len(photos.photos) <= 2:
        print("scikit-image is left out: it is not installed; the images are cut from 2 photos", file=sys.stderr)
    beton, writer = make_beton(photos, timeout_seconds=options.timeout)
    job = Job(
        str(photos.folder.resolve()), str(beton.resolve()), options.batch_size, options.workers, options.least_area
    )
    commands = {name: contender_command(name, job) for name in options.only or CONTENDERS}
    load = [os.getloadavg()[0]]
    rows, first_batch_seconds, absent = measure(
        commands, options.image_sizes, rounds=options.rounds, starts=options.starts, timeout_seconds=options.timeout
    )
    load.append(os.getloadavg()[0])
    unsaved = ("json", "chart", "read", "folder")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device("cpu")) | {"cores": os.cpu_count()},
        "load_average": [round(value, 2) for value in load],
        "versions": versions(LIBRARIES),
        "settings": {name: value for name, value in vars(options).items() if name not in unsaved},
        "images": {
            "number": photos.num_images,
            "mean_bytes": round(photos.mean_bytes),
            "photos": photos.photos,
            "beton_bytes": beton.stat().st_size,
            "beton_writer": writer,
        },
        "absent": absent,
        "rows": [described(row, rows) for row in rows],
        "first_batch_seconds": {name: spread(values) for name, values in first_batch_seconds.items()},
        "import_torch_seconds": spread(import_torch_seconds(options.starts)),
        "goals": goals(rows, first_batch_seconds),
    }


def contender_command(name: str, job: Job) -> list[str]:
    """The command that starts a contender's process."""
    return [sys.executable, "-m", "benchmarks.loader_contenders", name, json.dumps(dataclasses.asdict(job))]


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    commands: Mapping[str, Sequence[str]],
    image_sizes: Sequence[int],
    *,
    rounds: int,
    starts: int,
    timeout_seconds: float,
) -> tuple[list[Row], dict[str, list[float]], dict[str, str]]:
    """(rows, seconds to the first batch of each start, contenders left out and why)."""
    absent: dict[str, str] = {}
    first_batch: dict[str, list[float]] = {}
    rows = {(name, size): Row(name, size) for name in commands for size in image_sizes}
    with ExitStack() as stack:
        alive: dict[str, ContenderProcess] = {}

        def attempt(name: str, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except ContenderError as error:
                absent[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr)
                if name in alive:
                    alive.pop(name).kill()
                return None

        for name, command in commands.items():
            progress(f"starting {name}")
            started = attempt(name, lambda c=command: start(c, image_sizes[0], starts, timeout_seconds))
            if started is not None:
                alive[name], first_batch[name] = started
                stack.callback(alive[name].kill)
        order = random.Random(0)
        previous_size = dict.fromkeys(alive, image_sizes[0])
        begin = time.monotonic()
        for index in range(-1, rounds):  # the first one warms up
            for size in order.sample(image_sizes, len(image_sizes)) if index >= 0 else image_sizes[1:]:
                for name in order.sample(list(alive), len(alive)):
                    request = {"image_size": size, "epoch": index + 2}
                    answer = attempt(name, lambda n=name, r=request: alive[n].ask(r))
                    if answer is not None and index >= 0:
                        record(rows[name, size], answer, resized=size != previous_size[name])
                    previous_size[name] = size
            elapsed = time.monotonic() - begin
            progress(f"round {index + 1} of {rounds}, {elapsed / (index + 2) * (rounds - index - 1):.0f} s to go")
        progress("")
        for process in alive.values():
            process.close()
    kept = [row for row in rows.values() if row.contender not in absent]
    return kept, {name: values for name, values in first_batch.items() if name not in absent}, absent


def start(
    command: Sequence[str], image_size: int, starts: int, timeout_seconds: float
) -> tuple[ContenderProcess, list[float]]:
    """The last of `starts` processes, and each one's seconds from its start to its first batch."""
    seconds: list[float] = []
    while True:
        process = ContenderProcess(command, timeout_seconds=timeout_seconds)
        try:
            answer = process.ask({"image_size": image_size, "epoch": 0})
        except BaseException:
            process.kill()
            raise
        seconds.append(answer["first_batch_at"] - process.begun_at)
        if len(seconds) == starts:
            return process, seconds
        process.close()


def import_torch_seconds(starts: int) -> list[float]:
    """Seconds from start to end of processes that only import torch: a lower bound for any loader of tensors."""
    seconds = []
    for _ in range(starts):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=120)
        seconds.append(time.monotonic() - begin)
    return seconds


def record(row: Row, answer: Mapping[str, Any], *, resized: bool) -> None:
    """Add one pass to a row."""
    row.cpu_seconds.append(answer["cpu_seconds"] / answer["images"] * 1000)
    row.images_per_second.append(answer["images"] / answer["wall_seconds"])
    row.memory_mib.append(answer["memory_mib"])
    if resized:
        row.turnaround_seconds.append(answer["turnaround_seconds"])


# --- reporting -----------------------------------------------------------------------------------------------------


def described(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row for the JSON file."""
    reference = find_row(rows, REFERENCE, row.image_size)
    return {
        "contender": row.contender,
        "image_size": row.image_size,
        "n": len(row.cpu_seconds),
        "cpu_seconds_per_1000": spread(row.cpu_seconds),
        "images_per_second": spread(row.images_per_second),
        "ratio_to_ffcv": None if reference is None else spread(ratios(row, reference)),
        "turnaround_seconds": spread(row.turnaround_seconds) if row.turnaround_seconds else None,
        "memory_mib": most_memory([row]),
    }


def ratios(row: Row, reference: Row) -> list[float]:
    """CPU-seconds over those of another contender at the same size, round by round."""
    return [mine / theirs for mine, theirs in zip(row.cpu_seconds, reference.cpu_seconds, strict=True)]


def find_row(rows: Sequence[Row], contender: str, image_size: int) -> Row | None:
    """The row of a contender at a size, or None if it was left out."""
    return next((row for row in rows if (row.contender, row.image_size) == (contender, image_size)), None)


def most_memory(rows: Sequence[Row]) -> float | None:
    """Peak MiB over rows, or None if unknown."""
    known = [one for row in rows for one in row.memory_mib if one is not None]
    return round(max(known), 1) if known else None


def goals(rows: Sequence[Row], first_batch_seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Each goal that can be judged from the measured contenders, with its figure and verdict."""
    found = []
    mine = [row for row in rows if row.contender == OURS]
    for other, goal in GOALS.items():
        for row in mine:
            theirs = find_row(rows, other, row.image_size)
            if theirs is not None:
                what = f"CPU-seconds at {row.image_size} px over {TITLES[other]}'s"
                found.append(_judged(what, spread(ratios(row, theirs)), goal))
    memory = [most_memory([row for row in rows if row.contender == name]) for name in (OURS, REFERENCE)]
    if memory[0] is not None and memory[1] is not None:
        found.append(_judged(f"memory over {TITLES[REFERENCE]}'s", spread([memory[0] / memory[1]]), GOAL_MEMORY))
    if OURS in first_batch_seconds:
        first = spread(first_batch_seconds[OURS])
        found.append(_judged("seconds from the start to the first batch", first, GOAL_FIRST_BATCH_SECONDS))
    turnarounds = [seconds for row in mine for seconds in row.turnaround_seconds]
    if turnarounds:
        what = "seconds from the last batch to the first of another size"
        found.append(_judged(what, spread(turnarounds), GOAL_TURNAROUND_SECONDS))
    return found


def _judged(what: str, values: dict[str, float], goal: float) -> dict[str, Any]:
    return {"what": what, "values": values, "goal": goal, "verdict": verdict(values, goal)}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["contender", "px", "CPU-s/1,000", "95 %", "images/s", "over FFCV", "95 %", "MiB", "resized in s"]]
    for row in sorted(report["rows"], key=lambda row: row["image_size"]):
        cost, ratio, turnaround = row["cpu_seconds_per_1000"], row["ratio_to_ffcv"], row["turnaround_seconds"]
        lines.append(
            [
                TITLES[row["contender"]],
                str(row["image_size"]),
                f"{cost['median']:.3f}",
                f"{cost['low']:.3f} to {cost['high']:.3f}",
                f"{row['images_per_second']['median']:.0f}",
                f"{ratio['median']:.3f}" if ratio else "",
                f"{ratio['low']:.3f} to {ratio['high']:.3f}" if ratio else "",
                f"{row['memory_mib']:.0f}" if row["memory_mib"] is not None else "",
                f"{turnaround['median']:.2f}" if turnaround else "",
            ]
        )
    starts = [["contender", "seconds to the first batch", "least to most"]]
    first = {TITLES[name]: values for name, values in report["first_batch_seconds"].items()}
    for name, values in (first | {"(import torch, nothing else)": report["import_torch_seconds"]}).items():
        starts.append([name, f"{values['median']:.2f}", f"{values['min']:.2f} to {values['max']:.2f}"])
    return "\n\n".join([columns(lines), columns(starts), "\n".join(verdicts(report))])


def verdicts(report: dict[str, Any]) -> list[str]:
    """The setup of the measurement, each goal, and whether it was met."""
    images, settings, machine = report["images"], report["settings"], report["hardware"]
    lines = [
        f"n = {settings['rounds']} rounds, {settings['starts']} starts; {images['number']} JPEGs of "
        f"{images['mean_bytes'] / 1000:.0f} kB, {images['beton_bytes'] / images['number'] / 1000:.0f} kB each in the "
        f".beton file, which was written by {images['beton_writer']}; batches of {settings['batch_size']}, "
        f"{settings['workers']} workers; crops of {settings.get('least_area', CROP_SCALE[0])} to 1",
        f"{machine['cpu']}, {machine['cores']} cores, load average {' to '.join(map(str, report['load_average']))}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in report["absent"].items()]
    for goal in report["goals"]:
        values = goal["values"]
        lines.append(
            f"{goal['verdict']:6}  {goal['what']}: {values['median']:.3f} "
            f"(95 %: {values['low']:.3f} to {values['high']:.3f}); goal at most {goal['goal']:g}"
        )
    return lines


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """CPU-seconds per 1,000 images by size and contender, as bars with the 95 % interval of the median."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    sizes = sorted({row["image_size"] for row in report["rows"]})
    names = [name for name in TITLES if any(row["contender"] == name for row in report["rows"])]
    names.sort(key=lambda name: -statistics.median(_medians(report, name)))
    figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
    width = 0.85 / len(names)
    colors = pyplot.get_cmap("tab10")
    for number, name in enumerate(names):
        rows = {row["image_size"]: row["cpu_seconds_per_1000"] for row in report["rows"] if row["contender"] == name}
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(sizes))]
        heights = [rows[size]["median"] for size in sizes]
        below = [rows[size]["median"] - rows[size]["low"] for size in sizes]
        above = [rows[size]["high"] - rows[size]["median"] for size in sizes]
        color = {OURS: "black", "ours_libffcv": "dimgray"}.get(name, colors(number))
        hatch = "//" if name.startswith("limit") else None
        bars = axes.bar(places, heights, width, yerr=[below, above], label=TITLES[name], color=color, hatch=hatch,
                        edgecolor="white", error_kw={"elinewidth": 0.8})  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axes.set_ylabel("CPU-seconds per 1,000 images")
    axes.set_title(f"Random resized crop, flip, uint8; {report['hardware']['cpu']}, {report['date']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _medians(report: dict[str, Any], name: str) -> list[float]:
    return [row["cpu_seconds_per_1000"]["median"] for row in report["rows"] if row["contender"] == name]


if __name__ == "__main__":
    main()
