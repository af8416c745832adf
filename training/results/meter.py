"""Measures training while it runs: seconds of steps, the loader's share of them, speed against the device, memory.

All but the loss is read on the host, without waiting for the device. A caller reads at its own refresh interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import State

from training.late import LateQueue, Number

__all__ = ["Meter", "Reading", "Stopwatch", "Work", "device_peak_flops", "format_memory", "memory_bytes"]

_FLOPS_PER_MAC = 2


class Stopwatch:
    """Measures intervals: `stop` returns the seconds since `start`, 0 if it was not running."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None

    def start(self) -> None:
        """Start an interval, unless one is running."""
        if self._started is None:
            self._started = self._clock()

    def stop(self) -> float:
        """End the interval; returns its seconds."""
        if self._started is None:
            return 0.0
        seconds = self._clock() - self._started
        self._started = None
        return seconds


@dataclass(frozen=True)
class Reading:
    """Sums over the steps since the last `take`."""

    steps: int
    images: int
    seconds: float
    wait_seconds: float

    @property
    def images_per_second(self) -> float | None:
        """Images per second of training; None before the first step."""
        return self.images / self.seconds if self.seconds > 0 else None

    @property
    def data_wait_share(self) -> float | None:
        """Share of the training time during which the loader kept the step waiting, in [0, 1]."""
        return min(1.0, self.wait_seconds / self.seconds) if self.seconds > 0 else None


class Meter:
    """Sums up steps. A callback passes its events on to the methods of the same name, and reads with `peek` or `take`.

    A step's seconds run from the request for its batch to its end; its waiting seconds from there to the batch's
    arrival. Evaluation, saving and the batches that a resumed run skips are in neither.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._step, self._wait = Stopwatch(clock), Stopwatch(clock)
        self._skipping_batches = False
        self._losses: LateQueue[tuple[Number, int]] = LateQueue()  # with the step's images
        self.reset()

    def reset(self) -> None:
        """Drop the sums."""
        self._steps = self._images = self._loss_images = 0
        self._seconds = self._wait_seconds = self._loss_sum = 0.0
        self._losses.clear()

    def fit_start(self, state: State) -> None:
        self._step.stop()  # still running if an earlier fit() was interrupted
        self._wait.stop()
        # When resumed within an epoch, the Trainer draws that epoch's earlier batches and discards them.
        self._skipping_batches = int(state.timestamp.batch_in_epoch) > 0
        self.reset()

    def epoch_start(self) -> None:
        self._step.start()
        self._wait.start()

    def before_dataloader(self) -> None:
        if self._skipping_batches:
            self._step.stop()
            self._wait.stop()
        self._step.start()
        self._wait.start()

    def after_dataloader(self) -> None:
        self._skipping_batches = False
        self._wait_seconds += self._wait.stop()

    def batch_end(self, state: State) -> None:
        assert state.previous_timestamp is not None  # the Trainer sets it just before this event
        images = int(state.timestamp.sample) - int(state.previous_timestamp.sample)
        self._seconds += self._step.stop()
        self._steps += 1
        self._images += images
        loss = state.total_loss_dict.get("loss/train/total")
        if loss is not None:
            self._losses.put((loss, images), loss)
            self._add_losses(self._losses.take_due())

    def epoch_end(self) -> None:
        self._seconds += self._step.stop()
        self._wait_seconds += self._wait.stop()

    def peek(self) -> Reading:
        """The sums so far."""
        return Reading(steps=self._steps, images=self._images, seconds=self._seconds, wait_seconds=self._wait_seconds)

    def mean_loss(self) -> float | None:
        """The mean loss over the images since the last `take`, None unless every step had one. Waits for the device."""
        self._add_losses(self._losses.take_all())
        return self._loss_sum / self._loss_images if self._loss_images and self._loss_images == self._images else None

    def take(self) -> Reading:
        """The sums so far, which start again from nothing."""
        reading = self.peek()
        self.reset()
        return reading

    def _add_losses(self, losses: Iterable[tuple[Number, int]]) -> None:
        for loss, images in losses:
            self._loss_sum += float(loss) * images
            self._loss_images += images


@dataclass(frozen=True)
class Work:
    """What an image costs in each epoch, and what the devices could do.

    macs_per_image: multiply-adds of an image's forward and backward passes, for each epoch of the run.
    peak_flops: of all devices together at the run's precision; None if it is not known.
    """

    macs_per_image: Sequence[float]
    peak_flops: float | None = None

    def speed(self, images_per_second: float | None, *, epoch: int) -> dict[str, float]:
        """`mfu` (a share of 1) where the peak is known, else `gmacs_per_second`. epoch counts from 0."""
        if images_per_second is None or epoch >= len(self.macs_per_image):
            return {}
        macs = images_per_second * self.macs_per_image[epoch]
        return {"mfu": macs * _FLOPS_PER_MAC / self.peak_flops} if self.peak_flops else {"gmacs_per_second": macs / 1e9}


def device_peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of one device as Composer lists them for NVIDIA's data-center GPUs; None for any other.

    device: cpu, gpu or mps. precision: as in a recipe; fp32 means TF32 where torch lets convolutions use it.
    """
    if device != "gpu":
        return None
    import warnings

    from composer.callbacks.speed_monitor import get_gpu_flops_available

    tf32 = precision == "fp32" and torch.backends.cudnn.allow_tf32
    for name in (["tf32"] if tf32 else []) + [precision]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a GPU that it does not know
            peak: Any = get_gpu_flops_available(SimpleNamespace(precision=SimpleNamespace(value=name)))  # pyright: ignore
        if peak:
            return float(peak)
    return None


def memory_bytes(device: str) -> int:
    """The most that torch's allocator held on this rank's GPU so far, or this process's resident memory without one."""
    if device == "gpu":
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def format_memory(size_bytes: float) -> str:
    """GiB to three digits: "1.25 GiB", "12.5 GiB"."""
    gib = size_bytes / 2**30
    return f"{gib:.2f} GiB" if gib < 10 else f"{gib:.1f} GiB" if gib < 100 else f"{gib:.0f} GiB"
