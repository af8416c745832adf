"""Profiles some steps of a run: a trace for Perfetto, and a table of the dearest operators."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from data.whole_files import replace_file

__all__ = ["Profile"]

log = logging.getLogger(__name__)

_ROWS = 10
_WAIT_LABEL = "wait for data"


class Profile(Callback):
    """Runs torch's profiler over the steps `first` to `last`, counted from 1, and writes its results to `folder`.

    trace_steps_F-L_rankR.json.gz is a Chrome trace, which https://ui.perfetto.dev opens; operators_steps_F-L_rankR.txt
    lists the ten operators or kernels that took most time. A step lasts from the end of the one before to its own end;
    where an epoch ends in between, its evaluation is in it. Waiting for the loader is labeled. The step before the
    first one warms the profiler up. Nothing is written if the run stops in between.

    all_ranks: profile every rank; otherwise rank 0 only.
    """

    def __init__(self, folder: str | os.PathLike[str], *, first: int, last: int, all_ranks: bool = False) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"first={first}, last={last}: give steps from 1 on, the last not before the first")
        self._folder = Path(folder)
        self._first, self._last = first, last
        self._all_ranks = all_ranks
        self._profiler: Any = None
        self._waiting: Any = None
        self._is_over = False

    def fit_start(self, state: State, logger: Logger) -> None:
        done, rank = int(state.timestamp.batch), dist.get_global_rank()
        self._is_over = done >= self._last or (rank != 0 and not self._all_ranks)
        if rank != 0:
            return
        asked = f"logging.profile asks for steps {self._first} to {self._last}"
        if done >= self._last:
            log.warning("%s; this run continues after step %d, so nothing is profiled", asked, done)
        elif done >= self._first:
            log.warning("%s; this run continues after step %d, so only the rest of them is", asked, done)
            self._first = done + 1

    def before_dataloader(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch) + 1
        if not self._is_over and self._profiler is None and step >= self._first - 1:
            self._start(warmup_steps=self._first - step)
        if self._profiler is not None:
            self._waiting = torch.profiler.record_function(_WAIT_LABEL)
            self._waiting.__enter__()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._stop_waiting()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._profiler is None:
            return
        self._profiler.step()  # writes after the last one
        if int(state.timestamp.batch) >= self._last:
            self._stop()

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._stop_waiting()  # for the batch that did not come

    def close(self, state: State, logger: Logger) -> None:
        self._stop_waiting()
        self._stop()

    def _start(self, *, warmup_steps: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it prints its starts and stops, and that no GPU is there
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*won't be using warmup")  # at step 1 there is none
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(
                    wait=0, warmup=warmup_steps, active=self._last - self._first + 1, repeat=1
                ),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self._profiler.start()

    def _stop(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler, self._is_over = self._profiler, None, True
        profiler.on_trace_ready = None  # a part of the steps is not what was asked for
        profiler.stop()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.__exit__(None, None, None)
        self._waiting = None

    def _write(self, profiler: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}-{self._last}_rank{dist.get_global_rank()}"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
        trace = self._folder / f"trace_{name}.json.gz"
        beside = trace.with_name(f"partial_{trace.name}")  # its ending has torch compress it
        try:
            profiler.export_chrome_trace(str(beside))
            os.replace(beside, trace)
        finally:
            beside.unlink(missing_ok=True)
        replace_file(self._folder / f"operators_{name}.txt", lambda file: file.write(table.encode()))
