"""Whether the loader keeps up with a device: images/s into its memory while training steps run.

    python -m benchmarks.loaders --device cuda --model resnet50 --workers 8 --batch-size 256
    python -m benchmarks.loaders --device cpu --step-ms 40         # a sleep in place of a step, as of a faster device

At each image size, every round measures in random order the loader alone (batches into the device's memory), the step
alone (on one batch that is there already) and both together. The device is waited for at the end of each. A step is
forward, backward and SGD of a torchvision network on normalized images, in bfloat16 and channels-last on a GPU.

Kept up: the images/s of both together over those of the slower one of the two alone. On a CPU they share the cores, so
that figure is below 1 there.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading import files
from benchmarks.measuring import columns, progress, spread
from data import FFCVLoader, normalize
from data.loading.ahead import Ahead, BatchesAhead

NUM_CLASSES = 1000
_WARM_UP_BATCHES = 5
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Step = Callable[[torch.Tensor, torch.Tensor], None]


def main(arguments: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = files.parser("--device", (__doc__ or "").split("\n")[0], images=2000, rounds=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="that the batches go to")
    parser.add_argument("--model", choices=("resnet18", "resnet50"), default="resnet50", help="that trains there")
    parser.add_argument("--step-ms", type=float, metavar="MS", help="no training: each step is a wait of so long")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[128, 224], metavar="PX")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--batches", type=int, default=30, help="of each measurement")
    parser.add_argument(
        "--batches-ahead", type=_ahead, default="auto", help="decoded batches that may wait for the step"
    )
    parser.add_argument("--path", type=Path, help="a .beton file of your own in place of the photos")
    options = files.checked(parser, arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give --device cpu")
    files.carry_out(lambda: measure(options), table, options.json)


def _ahead(text: str) -> BatchesAhead:
    setting: Any = int(text) if text.isdecimal() else text
    try:
        Ahead(setting)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return setting


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One report."""
    progress("making the images")
    path = options.path or files.tiered_file(options.folder, options.images)
    device = torch.device(options.device)
    loader = files.loader(path, options, image_size=1, device=device, batches_ahead=options.batches_ahead)
    step = waiting_step(options.step_ms) if options.step_ms is not None else training_step(options.model, device)
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    order = random.Random(0)
    for number in range(-1, options.rounds):  # the first one warms up
        progress(f"round {number + 1} of {options.rounds}")
        for px in order.sample(options.image_sizes, len(options.image_sizes)):
            for what in order.sample(WAYS, len(WAYS)):
                loader.set_image_size(px)
                one = timed_pass(what, loader, step, options.batches)
                if number >= 0:
                    found.setdefault((px, what), []).append(one)
    progress("")
    unsaved = ("json", "folder", "path")
    return {
        **files.machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name not in unsaved},
        "rows": [row(px, {what: found[px, what] for what in WAYS}, loader) for px in options.image_sizes],
    }


WAYS = ("loader", "step", "both")


def timed_pass(what: str, loader: FFCVLoader, step: Step, num_batches: int) -> dict[str, float]:
    """images/s over `num_batches`, after some that do not count, and the share of the time in which the host waited
    for a batch."""
    batches = endless(loader)
    for _ in range(_WARM_UP_BATCHES):  # more than are decoded ahead, which cost nothing any more
        batch = next(batches)
        if what != "loader":
            step(*batch)
    finish(loader.device)
    begin, images, waited = time.perf_counter(), 0, 0.0
    for _ in range(num_batches):
        asked = time.perf_counter()
        if what != "step":
            batch = next(batches)
        waited += time.perf_counter() - asked
        if what != "loader":
            step(*batch)
        images += len(batch[1])
    finish(loader.device)
    seconds = time.perf_counter() - begin
    batches.close()
    return {"images_per_second": images / seconds, "waited": waited / seconds}


def endless(loader: FFCVLoader) -> Any:
    """Pass after pass."""
    while True:
        yield from loader


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waiting_step(milliseconds: float) -> Step:
    """A step that takes so long and computes nothing."""

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        finish(images.device)
        time.sleep(milliseconds / 1000)

    return step


def training_step(model: str, device: torch.device) -> Step:
    """Normalize, forward, backward and SGD."""
    import torchvision

    network = getattr(torchvision.models, model)(num_classes=NUM_CLASSES)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        inputs = normalize(images, mean=_MEAN, std=_STD)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row(image_size: int, passes: dict[str, list[dict[str, float]]], loader: FFCVLoader) -> dict[str, Any]:
    """One image size for the report."""
    rates = {what: [one["images_per_second"] for one in passes[what]] for what in WAYS}
    slower = [min(alone) for alone in zip(rates["loader"], rates["step"], strict=True)]
    return {
        "image_size": image_size,
        "file": loader.file_for(image_size).name,
        "images_per_second": {what: spread(rates[what]) for what in WAYS},
        "kept_up": spread([both / alone for both, alone in zip(rates["both"], slower, strict=True)]),
        "waited": spread([one["waited"] for one in passes["both"]]),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [["px", "loader alone", "step alone", "together, images/s", "95 %", "kept up", "waiting", "reads"]]
    for one in report["rows"]:
        rates = one["images_per_second"]
        lines.append(
            [
                str(one["image_size"]), f"{rates['loader']['median']:,.0f}", f"{rates['step']['median']:,.0f}",
                f"{rates['both']['median']:,.0f}", f"{rates['both']['low']:,.0f} to {rates['both']['high']:,.0f}",
                f"{one['kept_up']['median']:.2f}", f"{one['waited']['median']:.1%}", one["file"],
            ]
        )  # fmt: skip
    settings = report["settings"]
    step = settings["model"] if settings["step_ms"] is None else f"a wait of {settings['step_ms']:g} ms"
    notes = (
        f"{report['date']}, n = {settings['rounds']} rounds of {settings['batches']} batches of "
        f"{settings['batch_size']}; {settings['workers']} workers of {os.cpu_count()} cores; a step is {step} on "
        f"{settings['device']}; {files.machine_line(report)}"
    )
    return f"{columns(lines)}\n\n{notes}"
