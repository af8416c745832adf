"""A short run on the pretended GPU of tests/waits.py, with the callbacks of every run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composition import arranged, make_trainer
from waits import COPY, DEVICE, WAIT, PretendGPU

from training import late
from training.checkpoints.saving import Checkpoints
from training.engines.trainer import StepTrainer
from training.guards.finite import FiniteGuard
from training.results.progress import ProgressBar
from training.results.recorder import Recorder

kind_of_run = partial(StepTrainer, drop_last=True)


class _Done(Exception):
    pass


class WatchSteps(Callback):
    """Tells the pretended GPU which step is under way; `steady` are the steps that do not begin an epoch."""

    def __init__(self, gpu: PretendGPU, *, last_step: int | None) -> None:
        self.gpu, self.last_step = gpu, last_step
        self.steady: list[int] = []

    def before_dataloader(self, state: State, logger: Any) -> None:
        self.gpu.step = int(state.timestamp.batch)
        if self.gpu.step == self.last_step:
            raise _Done

    def after_dataloader(self, state: State, logger: Any) -> None:
        if int(state.timestamp.batch_in_epoch) > 0:
            self.steady.append(self.gpu.step)


class _EndOfWork:
    """In place of a CUDA event: reading what was copied less than two steps ago would stop the host."""

    def __init__(self, gpu: PretendGPU) -> None:
        self._gpu, self._step = gpu, gpu.step

    def synchronize(self) -> None:
        if self._gpu.step < self._step + late.STEPS_LATE:
            self._gpu.note(WAIT, "a late value, early")


def callbacks_of_a_run(folder: Path, *, on_nan: Any = "stop") -> list[Callback]:
    """Those that training/callbacks.py lists, with a progress bar that draws at every step."""
    guard = FiniteGuard(on_nan, run_dir=folder)
    ticks = iter(range(10**6))
    bar = ProgressBar(total_epochs=3, enabled=True, stream=io.StringIO(), clock=lambda: float(next(ticks)))
    return [Recorder(folder), guard, Checkpoints(folder / "checkpoints", before_save=guard.settle), bar]


def watch(
    monkeypatch: Any,
    chosen: Sequence[str] | Sequence[Any],
    callbacks: Sequence[Callback] = (),
    *,
    last_step: int | None = None,
    kind: Callable[..., Any] = kind_of_run,
    **settings: Any,
) -> tuple[PretendGPU, list[int]]:
    """Train the algorithms on the pretended GPU; returns it, and the steps that do not begin an epoch.

    chosen: names of algorithms with their example settings, or algorithms. last_step: where to end.
    """
    gpu = PretendGPU()
    watcher = WatchSteps(gpu, last_step=last_step)
    names = [one for one in chosen if isinstance(one, str)]
    algorithms = [*arranged(names), *(one for one in chosen if not isinstance(one, str))]
    trainer = make_trainer(algorithms, callbacks=[watcher, *callbacks], kind=kind, **settings)
    monkeypatch.setattr(late, "_LATE_DEVICES", {DEVICE.type})
    monkeypatch.setattr(late, "_end_of_work", lambda device: _EndOfWork(gpu))
    _move(trainer, gpu)
    try:
        with gpu:
            trainer.fit()
    except _Done:
        pass
    finally:
        trainer.close()
    return gpu, watcher.steady


def waits(gpu: PretendGPU, steps: Sequence[int], *, kind: str = WAIT) -> dict[str, int]:
    """Place -> the most events that it caused in one of `steps`."""
    counts = gpu.count(kind, steps=steps)
    return {place: max(count[place] for count in counts) for place in sorted(set().union(*counts))}


def copies(gpu: PretendGPU, steps: Sequence[int]) -> dict[str, int]:
    """Likewise, of the copies that the host does not wait for."""
    return waits(gpu, steps, kind=COPY)


def _move(trainer: Any, gpu: PretendGPU) -> None:
    """What a Trainer on a GPU moves there: the model, the metrics, each batch, and what the Trainer makes."""
    gpu.mark([*trainer.state.model.parameters(), *trainer.state.model.buffers()])
    for metric in trainer.state.train_metrics.values():
        gpu.mark([*metric._defaults.values(), *(getattr(metric, name) for name in metric._defaults)])
    device, spec = trainer.state.device, trainer._train_data_spec
    device._device = DEVICE
    device.tensor_to_device = lambda tensor: tensor.to(DEVICE, non_blocking=True)
    normalize = spec.batch_transforms
    spec.batch_transforms = lambda batch: normalize(tuple(part.to(DEVICE, non_blocking=True) for part in batch))
