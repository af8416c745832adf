"""Composer's Trainer without its waits for the GPU.

In every step Composer 0.32.1 reads from the GPU the loss, before the optimizer's step and after it, the images of all
ranks, twice, the step's time, and whether the loader has ended. Each time the GPU runs out of work until the host goes
on. Here the host does not ask the GPU, nor other ranks, for what it knows itself, and reads the loss late. What is
computed is the same to the last bit.
"""

from __future__ import annotations

import atexit
import datetime
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from composer import Trainer
from composer.core import Event
from composer.core.types import TrainerMode
from composer.utils import dist
from torch import Tensor

from training.late import LateValue

_NO_BATCH = object()
_WITHOUT_CLOSURE = ("torch.optim.", "composer.optim.", "training.", "algos.")  # modules of optimizers


class StepTrainer(Trainer):
    """Composer's Trainer for this project's loaders, whose training step reads nothing from the device.

    The loaders have equally many batches on every rank, of equally many images; only an epoch's last one may differ,
    unless `drop_last`. `state.total_loss_dict` holds `LateValue`s, for which float() waits.
    """

    def __init__(self, *, drop_last: bool, **settings: Any) -> None:
        self._drop_last = drop_last
        super().__init__(**settings)

    def end(self) -> None:
        """Close callbacks and loggers, and let go of what was trained. Unlike `close`, it waits for no other rank.

        That wait would keep a failed rank from reporting its error. And Composer leaves what it has closed, model and
        optimizer included, in the list of what to close at the process's exit, so that memory never comes back to a
        process that trains several times.
        """
        self.engine.close()
        atexit.unregister(self.engine._close)

    def _use_closures(self) -> bool:
        # For a closure, Composer reads the loss before the optimizer's step.
        return super()._use_closures() and not all(map(_needs_no_closure, self.state.optimizers))

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        # Composer asks all ranks before each batch whether one has none.
        assert self.state.dataloader is not None
        length, training = self.state.dataloader_len, trainer_mode == TrainerMode.TRAIN
        batches = itertools.islice(self.state.dataloader, None if length is None else int(length))
        while True:
            if training:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, _NO_BATCH)
            if batch is _NO_BATCH:
                if training:
                    self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
                return
            yield batch

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        losses = super()._train_batch(use_grad_scaling)
        if losses is None or self.logger.destinations:  # which take numbers
            return losses
        ranks = dist.get_world_size()
        if ranks > 1:
            for loss in losses.values():
                dist.all_reduce(loss)
        late = {name: LateValue(loss, divisor=ranks) for name, loss in losses.items()}
        self.state.total_loss_dict = late  # pyright: ignore[reportAttributeAccessIssue]: they convert to float
        return None  # for Composer: nothing to read

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        # Composer's own, but that it adds up the images of all ranks on the device.
        state = self.state
        if not ddp_sync or self.accumulate_train_batch_on_tokens or not self._ranks_are_alike():
            return super()._train_microbatches(microbatches, total_loss_dict, ddp_sync)
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        assert state.scaler is not None
        assert self._train_data_spec is not None
        scales = self._use_grad_scaling(state.precision, state.scaler)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        images = sum(self._train_data_spec.get_num_samples_in_batch(one) for one in microbatches)
        batch = state.batch
        for index, state.batch in enumerate(microbatches, start=1):
            state.batch = state.device.batch_to_device(state.batch)
            state.batch = self._train_data_spec.microbatch_transforms(state.batch)
            for name, loss in self._train_microbatch(scales, images, index == len(microbatches)).items():
                total = total_loss_dict.setdefault(f"loss/train/{name}", torch.zeros_like(loss).reshape(1))
                total += loss
        state.batch = batch
        if scales:
            for optimizer in state.optimizers:
                state.scaler.unscale_(optimizer)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict["loss/train/total"]

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        if isinstance(num_samples, int):
            # Composer counted them before BATCH_START, where an algorithm may have left some out.
            assert self._train_data_spec is not None
            num_samples = self._train_data_spec.get_num_samples_in_batch(self.state.batch)
        if not isinstance(num_samples, int) or not self._ranks_are_alike():
            return super()._accumulate_time_across_ranks(num_samples, num_tokens, batch_time)
        ranks = dist.get_world_size()
        return num_samples * ranks, num_tokens * ranks, batch_time  # the time is this rank's own

    def _ranks_are_alike(self) -> bool:
        """Whether every rank has as many images in this step as this one."""
        if self._drop_last or dist.get_world_size() == 1:
            return True
        length = self.state.dataloader_len
        return length is not None and int(self.state.timestamp.batch_in_epoch) + 1 < int(length)


def _needs_no_closure(optimizer: torch.optim.Optimizer) -> bool:
    # A recipe refuses those of torch that need one. Composer's SAM runs it twice; of other libraries' nothing is known.
    return type(optimizer).__module__.startswith(_WITHOUT_CLOSURE)
