"""One progress bar for the whole run, or one line per epoch without a terminal.

Both fit 120 columns and a narrower terminal: what matters least is left out first.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm

from training.late import LateQueue, Number
from training.results.meter import Meter, Work, format_memory, memory_bytes
from training.results.text import format_macs, format_seconds

__all__ = ["ProgressBar"]

_REFRESH_SECONDS = 0.2
_COLUMNS = 120  # where the terminal's width is not known
_BAR_COLUMNS = 18  # of "100% |##########| "
_SMOOTHED_STEPS = 20  # the bar's loss is an average that forgets over about so many steps
# What a line shows, in its order. Where it does not fit, the parts with the highest numbers are left out first.
_RANKS = {
    "time": 0, "epoch": 1, "image_size": 8, "loss": 2, "top1": 3, "rate": 4, "wait": 5, "speed": 6, "memory": 7,
    "learning_rate": 9, "eta": 0,
}  # fmt: skip


class ProgressBar(Callback):
    """Shows a run's progress on rank 0's stderr.

    Elapsed time, ETA, epoch, image size, loss (a running mean on the bar, the epoch's mean on a line), evaluated top-1,
    images/s and share of time spent waiting for data (this epoch's), MFU or GMAC/s, memory of this rank, learning rate.

    The ETA assumes that time is proportional to `epoch_costs`: with progressive resizing, early epochs are cheaper than
    late ones, and counting epochs would be too optimistic.

    epoch_costs: cost of each epoch of the run in any unit, such as forward multiply-adds; None: all equal.
    total_epochs: epochs of the whole run, including those before a resumption.
    work: what an image costs, for MFU or GMAC/s; None shows neither.
    device: cpu, gpu or mps: whose memory is shown.
    enabled: None: a bar if stderr is a terminal, else a plain line after each epoch. True: a bar always. False: silent.

    Raises:
        ValueError: total_epochs < 1, or epoch_costs has another length or a value that is not positive.
    """

    def __init__(
        self,
        *,
        total_epochs: int,
        epoch_costs: Sequence[float] | None = None,
        work: Work | None = None,
        device: str = "cpu",
        enabled: bool | None = None,
        metric: str = "top1",
        evaluator: str = "eval",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if total_epochs < 1:
            raise ValueError(f"total_epochs={total_epochs}: a run has at least one epoch; set it to 1 or more")
        self._costs = _shares(epoch_costs, total_epochs=total_epochs)  # of the run's cost, summing to 1
        self._work = work
        self._device = device
        self._enabled = enabled
        self._metric = metric
        self._evaluator = evaluator
        self._stream = stream
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._prints_lines = False
        self._started: float | None = None  # when this session began training
        self._cost_at_start = 0.0  # what earlier sessions had done
        self._cost_done = 0.0
        self._drawn = -math.inf
        self._meter = Meter(clock)
        self._learning_rate: float | None = None
        self._smoothed = _Smoothed()
        self._top1: float | None = None
        self._image_size: int | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self.close(state, logger)
        if self._enabled is False or dist.get_global_rank() != 0:
            return
        stream = self._stream or sys.stderr
        self._started = self._clock()
        self._cost_at_start = self._cost_done = self._cost_of(state)
        self._meter.fit_start(state)
        self._smoothed = _Smoothed()
        if self._enabled or stream.isatty():
            self._bar = _new_bar(stream, initial=self._cost_done, text=self._bar_text(state))
        else:
            self._prints_lines = True

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._meter.reset()
        self._meter.epoch_start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._meter.before_dataloader()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._meter.after_dataloader()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        # The last event before the optimizer's step. At BATCH_END the schedulers have moved on to the next step's rate.
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._started is None:
            return
        self._meter.batch_end(state)
        loss = state.total_loss_dict.get("loss/train/total")
        if loss is not None:
            self._smoothed.add(loss)
        if self._clock() - self._drawn >= _REFRESH_SECONDS:
            self._cost_done = self._cost_of(state)
            self._draw(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._meter.epoch_end()

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(self._evaluator, {}).get(self._metric)
        if state.dataloader_label == self._evaluator and metric is not None:
            self._top1 = float(metric.compute())

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._cost_done = self._cost_of(state)
        self._draw(state)
        if self._prints_lines:
            finished = int(state.timestamp.epoch)
            parts = self._parts(state, finished, loss=self._meter.mean_loss())
            text = _fitted({**parts, "eta": f"ETA {format_seconds(self._eta_seconds())}"}, columns=_COLUMNS)
            print(text, file=self._stream or sys.stderr, flush=True)
        self._top1 = self._top1 if self._bar else None  # a line reports its own epoch's evaluation only

    def fit_end(self, state: State, logger: Logger) -> None:
        self._draw(state)
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Leave the bar as it is and the cursor on a new line. The Trainer calls this after errors as well."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._prints_lines = False
        self._started = None

    def _cost_of(self, state: State) -> float:
        """Share of the run's cost done so far; an unfinished epoch counts by its share of batches."""
        epoch = min(int(state.timestamp.epoch), len(self._costs))
        done = sum(self._costs[:epoch])
        batches = state.dataloader_len
        if epoch < len(self._costs) and batches is not None and int(batches) > 0:
            done += self._costs[epoch] * min(1.0, int(state.timestamp.batch_in_epoch) / int(batches))
        return done

    def _eta_seconds(self) -> float | None:
        done_here = self._cost_done - self._cost_at_start
        if self._started is None or done_here <= 0:
            return None
        return (self._clock() - self._started) / done_here * max(0.0, 1 - self._cost_done)

    def _draw(self, state: State) -> None:
        if self._bar is None or self._started is None:
            return
        self._bar.n = self._cost_done
        self._bar.set_description_str(self._bar_text(state), refresh=False)
        self._bar.refresh()
        self._drawn = self._clock()

    def _bar_text(self, state: State) -> str:
        """Elapsed < ETA first, as in any tqdm bar."""
        assert self._started is not None
        elapsed, eta = format_seconds(self._clock() - self._started), format_seconds(self._eta_seconds())
        current = min(int(state.timestamp.epoch) + 1, len(self._costs))
        parts = self._parts(state, current, loss=self._smoothed.value)
        columns = _width(self._stream or sys.stderr) - _BAR_COLUMNS
        return _fitted({"time": f"{elapsed}<{eta}", **parts}, columns=columns)

    def _parts(self, state: State, epoch: int, *, loss: float | None) -> dict[str, str]:
        """What a line says of `epoch` (from 1), by the names of `_RANKS`; what is not known is left out."""
        parts = {"epoch": f"epoch {epoch}/{len(self._costs)}"}
        image_size = getattr(state.train_dataloader, "image_size", None)
        if image_size is not None and self._meter.peek().steps:
            self._image_size = image_size
        if self._image_size is not None:
            parts["image_size"] = f"{self._image_size} px"
        if loss is not None:
            parts["loss"] = f"loss {loss:.3f}"
        if self._top1 is not None:
            parts["top1"] = f"top-1 {100 * self._top1:.1f} %"
        reading = self._meter.peek()
        if reading.images_per_second is not None and reading.data_wait_share is not None:
            parts["rate"] = f"{reading.images_per_second:,.0f} images/s"
            parts["wait"] = f"wait {100 * reading.data_wait_share:.0f} %"
            parts.update(self._machine(reading.images_per_second, epoch=epoch))
        if self._learning_rate is not None:
            parts["learning_rate"] = f"lr {self._learning_rate:.3g}"
        return parts

    def _machine(self, images_per_second: float, *, epoch: int) -> dict[str, str]:
        parts = {"memory": format_memory(memory_bytes(self._device))}
        speed = self._work.speed(images_per_second, epoch=epoch - 1) if self._work is not None else {}
        if "mfu" in speed:
            return {"speed": f"MFU {100 * speed['mfu']:.0f} %", **parts}
        if "gmacs_per_second" in speed:
            return {"speed": f"{format_macs(1e9 * speed['gmacs_per_second'])}MAC/s", **parts}
        return parts


class _Smoothed:
    """A running mean of the last steps' losses, right from the first one on; on a GPU without the very last."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0
        self._losses: LateQueue[Number] = LateQueue()

    def add(self, loss: Number) -> None:
        keep = 1 - 1 / _SMOOTHED_STEPS
        self._losses.put(loss, loss)
        for one in self._losses.take_due():
            self._sum, self._weight = keep * self._sum + float(one), keep * self._weight + 1

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None


def _fitted(parts: dict[str, str], *, columns: int) -> str:
    """The parts in the order of `_RANKS`, without those that matter least where `columns` do not hold all."""
    kept = sorted(parts, key=lambda name: _RANKS[name])
    while len(kept) > 1 and len("  ".join(parts[name] for name in kept)) > columns:
        kept.pop()
    return "  ".join(parts[name] for name in _RANKS if name in kept)


def _width(stream: TextIO) -> int:
    """Columns that a line may take: one less than the terminal has, where the cursor stays."""
    try:
        return os.get_terminal_size(stream.fileno()).columns - 1
    except (OSError, ValueError):  # no terminal; io.UnsupportedOperation is both
        return _COLUMNS


def _new_bar(stream: TextIO, *, initial: float, text: str) -> tqdm[Any]:
    return tqdm(
        total=1.0,
        initial=initial,
        desc=text,
        file=stream,
        bar_format="{percentage:3.0f}% |{bar:10}| {desc}",
        dynamic_ncols=True,
        leave=True,
    )


def _shares(epoch_costs: Sequence[float] | None, *, total_epochs: int) -> list[float]:
    if epoch_costs is None:
        return [1 / total_epochs] * total_epochs
    if len(epoch_costs) != total_epochs:
        raise ValueError(
            f"epoch_costs has {len(epoch_costs)} costs for total_epochs={total_epochs}: give one an epoch, or None"
        )
    for epoch, cost in enumerate(epoch_costs, start=1):
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(
                f"epoch_costs holds {cost} for epoch {epoch}: a cost is a positive number; give one, or None"
            )
    total = sum(epoch_costs)
    return [cost / total for cost in epoch_costs]
