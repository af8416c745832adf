"""Evaluates, exports and keeps the averages of a schedule-free optimizer, with batch norm's statistics at them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from composer.core import Callback, DataSpec, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from training.optimizers.schedule_free import ScheduleFree

_BATCHES = 16  # that batch norm's statistics are taken from


class EvaluateAverages(Callback):
    """Has the network hold the averages while it is evaluated; the weights and buffers come back bit for bit.

    Batch norm's running statistics are of the weights that trained. At the averages they are taken anew: the mean over
    the first batches of the epoch in progress, or else of the last one, cropped and augmented as in training, with
    every other layer as in evaluation. Ranks take the mean of theirs. Random draws of the run do not change.

    A checkpoint has the statistics of its step's evaluation, if there was one.

    train: of the loader that the run trains on.
    """

    def __init__(self, train: DataSpec) -> None:
        self._train = train
        self._statistics: dict[str, Tensor] = {}  # by the network's names; empty after a step
        self._before: dict[str, Tensor] = {}
        self._evaluations = 0  # in progress, nested

    def eval_start(self, state: State, logger: Logger) -> None:
        """Put the averages into the network."""
        self._evaluations += 1
        if self._evaluations > 1:
            return
        _reshard(state.model)
        for optimizer in _schedule_free(state):
            optimizer.eval()
        network = _unwrapped(state.model)
        self._before = {name: buffer.clone() for name, buffer in _statistics(network).items()}
        if self._before and not self._statistics:
            with _only_norms_train(network), _uncompiled(network), _same_draws(state):
                self._take_statistics(state, network)
            self._statistics = {name: buffer.clone() for name, buffer in _statistics(network).items()}
        _put(network, self._statistics)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Put the weights back."""
        self._evaluations -= 1
        if self._evaluations == 0:
            self._give_back(state)

    predict_start, predict_end = eval_start, eval_end

    def fit_start(self, state: State, logger: Logger) -> None:
        """Put the weights back after an evaluation that failed."""
        self._evaluations = 0
        self._give_back(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """The averages have moved on."""
        self._statistics = {}

    def state_dict(self) -> dict[str, Any]:
        """The statistics at the averages, for exports too."""
        return {"statistics": {name: buffer.clone() for name, buffer in self._statistics.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._statistics = dict(state["statistics"])

    def _give_back(self, state: State) -> None:
        _reshard(state.model)
        for optimizer in _schedule_free(state):
            optimizer.train()
        _put(_unwrapped(state.model), self._before)
        self._before = {}

    def _take_statistics(self, state: State, network: nn.Module) -> None:
        done = state.timestamp
        loader: Any = self._train.dataloader
        position = loader.position
        loader.set_position(max(0, done.epoch.value - (0 if done.batch_in_epoch.value else 1)))
        batches = iter(loader)
        try:
            for batch in itertools.islice(batches, _BATCHES):
                with get_precision_context(state.precision, state.precision_config):
                    network(self._train.batch_transforms(batch))
        finally:
            batches.close()
            loader.set_position(*position)
        ranks = dist.get_world_size()
        for buffer in _statistics(network).values():
            if ranks > 1 and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= ranks


def _schedule_free(state: State) -> list[ScheduleFree]:
    return [optimizer for optimizer in state.optimizers if isinstance(optimizer, ScheduleFree)]


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _reshard(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # its root stays gathered after an evaluation


def _norms(network: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    }


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, norm in _norms(network).items()
        for name, buffer in norm.named_buffers(recurse=False)
    }


def _put(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    current = _statistics(network) if values else {}
    for name, value in values.items():
        current[name].copy_(value)


@contextlib.contextmanager
def _only_norms_train(network: nn.Module) -> Iterator[None]:
    """Batch norms gather the mean of what they see; everything else is as in evaluation."""
    norms = list(_norms(network).values())
    was_training, momenta = network.training, [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.train(was_training)


@contextlib.contextmanager
def _uncompiled(network: nn.Module) -> Iterator[None]:
    """Forward passes without the compiled graphs, none of which is for norms that train in a network that does not."""
    compiled = {
        part: forward for part in network.modules() if hasattr(forward := vars(part).get("forward"), "original")
    }
    try:
        for part, forward in compiled.items():
            part.forward = forward.original  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for part, forward in compiled.items():
            part.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _same_draws(state: State) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if state.device.name == "gpu" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
