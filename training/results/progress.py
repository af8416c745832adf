"""One progress bar for the whole run, or one line per epoch without a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm

from training.results.recorder import Stopwatch
from training.results.text import format_seconds

__all__ = ["ProgressBar"]

_REFRESH_SECONDS = 0.2


class ProgressBar(Callback):
    """Shows a run's progress on rank 0's stderr: epoch, image size, loss, evaluated top-1, images/s, elapsed, ETA.

    The ETA assumes that time is proportional to `epoch_costs`: with progressive resizing, early epochs are cheaper than
    late ones, and counting epochs would be too optimistic.

    epoch_costs: cost of each epoch of the run in any unit, such as forward multiply-adds; None: all equal.
    total_epochs: epochs of the whole run, including those before a resumption.
    enabled: None: a bar if stderr is a terminal, else a plain line after each epoch. True: a bar always. False: silent.

    Raises:
        ValueError: total_epochs < 1, or epoch_costs has another length or a value that is not positive.
    """

    def __init__(
        self,
        *,
        total_epochs: int,
        epoch_costs: Sequence[float] | None = None,
        enabled: bool | None = None,
        metric: str = "top1",
        evaluator: str = "eval",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if total_epochs < 1:
            raise ValueError(f"total_epochs={total_epochs}: a run has at least one epoch; set it to 1 or more")
        self._costs = _shares(epoch_costs, total_epochs=total_epochs)  # of the run's cost, summing to 1
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
        self._stopwatch = Stopwatch(clock)
        self._skipping_batches = False
        self._top1: float | None = None
        self._image_size: int | None = None
        self._reset_epoch()

    def fit_start(self, state: State, logger: Logger) -> None:
        self.close(state, logger)
        if self._enabled is False or dist.get_global_rank() != 0:
            return
        stream = self._stream or sys.stderr
        self._started = self._clock()
        self._cost_at_start = self._cost_done = self._cost_of(state)
        self._stopwatch.stop()
        # When resumed within an epoch, the Trainer draws that epoch's earlier batches and discards them.
        self._skipping_batches = int(state.timestamp.batch_in_epoch) > 0
        self._reset_epoch()
        if self._enabled or stream.isatty():
            self._bar = _new_bar(stream, initial=self._cost_done, text=self._bar_text(state))
        else:
            self._prints_lines = True

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._reset_epoch()
        self._stopwatch.start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._skipping_batches:
            self._stopwatch.stop()
        self._stopwatch.start()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._skipping_batches = False

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._started is None:
            return
        assert state.previous_timestamp is not None  # the Trainer sets it just before this event
        images = int(state.timestamp.sample) - int(state.previous_timestamp.sample)
        self._epoch_seconds += self._stopwatch.stop()
        self._epoch_images += images
        loss = state.total_loss_dict.get("loss/train/total")
        if loss is not None:
            self._last_loss = float(loss)
            self._loss_sum += self._last_loss * images
        self._image_size = getattr(state.train_dataloader, "image_size", None)
        self._cost_done = self._cost_of(state)
        if self._clock() - self._drawn >= _REFRESH_SECONDS:
            self._draw(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._epoch_seconds += self._stopwatch.stop()

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(self._evaluator, {}).get(self._metric)
        if state.dataloader_label == self._evaluator and metric is not None:
            self._top1 = float(metric.compute())

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._cost_done = self._cost_of(state)
        self._draw(state)
        if self._prints_lines:
            finished = int(state.timestamp.epoch)
            loss = self._loss_sum / self._epoch_images if self._epoch_images else None
            text = f"{self._text(finished, loss=loss)}  ETA {format_seconds(self._eta_seconds())}"
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

    def _reset_epoch(self) -> None:
        self._epoch_images = 0
        self._epoch_seconds = 0.0
        self._loss_sum = 0.0
        self._last_loss: float | None = None

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
        """Elapsed < ETA first, as in any tqdm bar: a narrow terminal cuts off the end."""
        assert self._started is not None
        elapsed, eta = format_seconds(self._clock() - self._started), format_seconds(self._eta_seconds())
        current = min(int(state.timestamp.epoch) + 1, len(self._costs))
        return f"{elapsed}<{eta}  {self._text(current, loss=self._last_loss)}"

    def _text(self, epoch: int, *, loss: float | None) -> str:
        parts = [f"epoch {epoch}/{len(self._costs)}"]
        if self._image_size is not None:
            parts.append(f"{self._image_size} px")
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if self._top1 is not None:
            parts.append(f"top-1 {100 * self._top1:.1f} %")
        if self._epoch_seconds > 0:
            parts.append(f"{self._epoch_images / self._epoch_seconds:,.0f} images/s")
        return "  ".join(parts)


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
