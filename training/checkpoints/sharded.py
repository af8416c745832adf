"""A checkpoint as a folder: each rank writes its part of the weights and of the optimizer's state.

    .metadata, __0_0.distcp, __1_0.distcp ...   the tensors, in torch's distributed format
    state.pt                                    the rest of the run's state, and every rank's random state

Any number of ranks can read it, under any engine. Neither writing nor reading gathers the tensors in one place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_STATE, _METADATA = "state.pt", ".metadata"
_TENSORS = ("model", "optimizers")  # what `State.state_dict` would gather


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a sharded checkpoint."""
    return (Path(path) / _METADATA).is_file()


def save_shards(state: State, folder: Path) -> None:
    """Write the run's whole state to the new folder `folder`. Every rank must call this."""
    rest, random_state = state_without_tensors(state), reproducibility.get_rng_state()
    model = get_model_state_dict(state.model)  # first, since it reshards what an evaluation left gathered
    optimizer = get_optimizer_state_dict(state.model, state.optimizers[0])
    if dist.get_global_rank() == 0:
        folder.mkdir(exist_ok=True)  # a faster rank may have created it for its part
        with open(folder / _STATE, "wb") as file:
            torch.save({"state": rest, "rng": random_state, "param_groups": optimizer["param_groups"]}, file)
            file.flush()
            os.fsync(file.fileno())
    save({"model": model, "optimizer": optimizer["state"]}, storage_writer=FileSystemWriter(folder))


class LoadShards(Callback):
    """Loads the folder `path` when the Trainer would load a file: after sharding, before the first step.

    Afterwards `rng_state` holds the random states, which the Trainer restores at its first step.

    state.pt and .metadata are pickles: load only checkpoints that you trust as you trust code.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.rng_state: list[dict[str, Any]] | None = None

    def before_load(self, state: State, logger: Logger) -> None:
        run_name = state.run_name
        saved = torch.load(self._path / _STATE, map_location="cpu", weights_only=False)
        self._load_tensors(state, saved["param_groups"])
        state.load_state_dict(saved["state"], logger)
        state.run_name = run_name
        self.rng_state = saved["rng"]

    def _load_tensors(self, state: State, param_groups: list[dict[str, Any]]) -> None:
        optimizer = state.optimizers[0]
        tensors = {
            "model": get_model_state_dict(state.model),
            "optimizer": get_optimizer_state_dict(state.model, optimizer)["state"],
        }
        try:
            load(tensors, storage_reader=FileSystemReader(self._path), no_dist=not distributed.is_initialized())
        except CheckpointException as error:
            reasons = sorted({str(failure).splitlines()[0] for failure, _ in error.failures.values()})
            raise ValueError(f"{self._path} is of another network or optimizer: {'; '.join(reasons)}") from error
        options = StateDictOptions(strict=True)
        set_model_state_dict(state.model, tensors["model"], options=options)
        loaded: Any = {"state": tensors["optimizer"], "param_groups": param_groups}
        set_optimizer_state_dict(state.model, optimizer, loaded, options=options)


def state_without_tensors(state: State) -> dict[str, Any]:
    """`state.state_dict` without the weights and the optimizer's state, which it would gather."""
    whole = state.serialized_attributes
    state.serialized_attributes = [name for name in whole if name not in _TENSORS]
    try:
        return state.state_dict()
    finally:
        state.serialized_attributes = whole
