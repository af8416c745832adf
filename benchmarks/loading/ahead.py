"""How much waiting each number of batches ahead leaves, from decoding times as they were on this machine.

    python -m benchmarks.loaders --ahead
    python -m benchmarks.loaders --ahead --disturbers 2            # beside processes that take the cores now and then

Records the wall-clock time of every part of a batch in passes at each image size, and then plays the times back to a
consumer that takes a batch every so often: at a load of 0.9, decoding would take 0.9 of the consumer's time. The table
has the share of its time for which the consumer waits, by the number of batches ahead. "rule" is the number that
`batches_ahead: auto` takes after these times (`data.loading.ahead`).
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.loading import files
from benchmarks.measuring import columns, progress
from data import FFCVLoader
from data.loading import ffcv_loader
from data.loading.ahead import batches_for_times

DEPTHS = (1, 2, 3, 4, 6, 8, 16, 32)
LOADS = (0.7, 0.8, 0.9, 0.95)
# Computes for 0.1 to 0.4 s and sleeps as long.
_DISTURBER = """
import random, time
while True:
    seconds = random.uniform(0.1, 0.4)
    end = time.monotonic() + seconds
    while time.monotonic() < end: pass
    time.sleep(seconds)
"""


def main(arguments: Sequence[str]) -> None:
    """Record, play back, and print the table."""
    parser = files.parser("--ahead", (__doc__ or "").split("\n")[0], images=2000, rounds=5)
    parser.add_argument("--ahead", action="store_true", help="this benchmark")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[128, 224], metavar="PX")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--disturbers", type=int, default=0, metavar="N", help="processes that compute now and then")
    options = files.checked(parser, arguments)
    files.carry_out(lambda: measure(options), table, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One report."""
    path = files.tiered_file(options.folder, options.images)
    rows = []
    with disturbed(options.disturbers):
        for px in options.image_sizes:
            progress(f"recording at {px} px")
            loader = files.loader(path, options, image_size=px)
            times = recorded_seconds(loader, options.rounds)
            rows.append(described(times, options.workers, px, options.batch_size))
    progress("")
    unsaved = ("json", "folder")
    return {
        **files.machine(),
        "settings": {name: value for name, value in vars(options).items() if name not in unsaved},
        "rows": rows,
    }


@contextmanager
def disturbed(number: int) -> Iterator[None]:
    """Beside so many processes that compute now and then."""
    processes = [subprocess.Popen([sys.executable, "-c", _DISTURBER]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def recorded_seconds(loader: FFCVLoader, passes: int) -> np.ndarray:
    """Seconds of the parts of each batch, [batches, parts], over whole passes without a consumer that waits."""
    recorded: list[list[float]] = []
    original = ffcv_loader.timed

    def recording(task: Any, seconds: list[float]) -> None:
        original(task, seconds)
        recorded.append(seconds)  # the list of its batch, once a part

    ffcv_loader.timed = recording
    try:
        for _ in loader:  # the first pass warms up
            pass
        recorded.clear()
        for _ in range(passes):
            for _ in loader:
                pass
    finally:
        ffcv_loader.timed = original
    batches = list({id(seconds): seconds for seconds in recorded}.values())
    return np.array(batches)


def described(times: np.ndarray, workers: int, image_size: int, batch_size: int) -> dict[str, Any]:
    """The spread of the times at one size, and what each number of batches ahead leaves of the waiting."""
    sums = times.sum(axis=1)
    cv, pace = float(sums.std() / sums.mean()), float(sums.mean()) / min(workers, times.shape[1])
    rule = batches_for_times(sums[-1024:])
    return {
        "image_size": image_size,
        "batches": len(times),
        "batch_ms": pace * 1000,
        "cv": cv,
        "longest_over_mean": float(sums.max() / sums.mean()),
        "rule": rule,
        "mib_per_batch": batch_size * 3 * image_size**2 / 2**20,
        "waiting": {
            str(load): {str(ahead): share_waited(times, workers, ahead, pace / load) for ahead in (*DEPTHS, rule)}
            for load in LOADS
        },
    }


def share_waited(times: np.ndarray, workers: int, ahead: int, step_seconds: float) -> float:
    """The share of its time for which a consumer waits that takes a batch, and `step_seconds` later the next.

    As `PrefetchIterator` does it: parts start in order when a thread is free, `workers` + `ahead` batches' parts of
    them before they are asked for. The wait for the first batch does not count.

    Args:
        times: seconds of each part, [batches, parts].
    """
    num_batches, parts = times.shape
    seconds, most = times.ravel(), workers + ahead * parts
    free, done = [0.0] * workers, []
    now, waited, begun = 0.0, 0.0, 0.0
    for number in range(num_batches):
        asked = now
        for part in range(number * parts, (number + 1) * parts):
            # The one that is asked for leaves, so that another may begin.
            while len(done) < min(len(seconds), part + most + (part > 0 or len(done) > 0)):
                start = max(heapq.heappop(free), now)
                done.append(start + seconds[len(done)])
                heapq.heappush(free, done[-1])
            now = max(now, done[part])
        if number == 0:
            begun = now
        else:
            waited += now - asked
        now += step_seconds
    return waited / (now - begun)


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["px", "load", *(f"{ahead} ahead" for ahead in DEPTHS), "rule"]]
    notes = []
    for row in report["rows"]:
        for load, waiting in row["waiting"].items():
            lines.append(
                [str(row["image_size"]), load, *(f"{waiting[str(ahead)]:.2%}" for ahead in (*DEPTHS, row["rule"]))]
            )
        notes.append(
            f"{row['image_size']} px: {row['batches']} batches of {row['batch_ms']:.0f} ms, cv {row['cv']:.3f}, the "
            f"longest {row['longest_over_mean']:.1f} times the mean; rule: {row['rule']} ahead, "
            f"{row['rule'] * row['mib_per_batch']:.0f} MiB"
        )
    settings = report["settings"]
    notes.append(
        f"{report['date']}; batches of {settings['batch_size']}, {settings['workers']} workers, "
        f"{settings['disturbers']} disturbers; {files.machine_line(report)}"
    )
    return f"{columns(lines)}\n\n" + "\n".join(notes)
