"""A checkpoint as a folder: each rank writes its part of the weights and of the optimizer's state.

    .metadata, __0_0.distcp, __1_0.distcp ...   the tensors, in torch's distributed format
    state.pt                                    the rest of the run's state, and every rank's random state

Any number of ranks can read it, under any engine. Neither writing nor reading gathers the tensors in one place. The
first and the last are pickles: read them within training.checkpoints.reading, which makes torch.load read data only.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import filesystem, metadata
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


def gather_shards(state: State) -> dict[str, Any]:
    """The run's whole state, of which each rank has its part; every rank must call this. Tensors are the run's own."""
    rest, random_state = state_without_tensors(state), reproducibility.get_rng_state()
    model = get_model_state_dict(state.model)  # first, since it reshards what an evaluation left gathered
    optimizer = get_optimizer_state_dict(state.model, state.optimizers[0])
    return {
        "tensors": {"model": model, "optimizer": optimizer["state"]},
        _STATE: {"state": rest, "rng": random_state, "param_groups": optimizer["param_groups"]},
    }


def write_shards(gathered: dict[str, Any], folder: Path, *, group: ProcessGroup | None = None) -> None:
    """Write what `gather_shards` returned, or a copy of it, to the new folder `folder`. Every rank must call this.

    group: through which the ranks agree; a thread needs one of its own.
    """
    if dist.get_global_rank() == 0:
        folder.mkdir(exist_ok=True)  # a faster rank may have created it for its part
        with open(folder / _STATE, "wb") as file:
            torch.save(gathered[_STATE], file)
            file.flush()
            os.fsync(file.fileno())
    save(gathered["tensors"], storage_writer=FileSystemWriter(folder), process_group=group)


class LoadShards(Callback):
    """Loads the folder `path` when the Trainer would load a file: after sharding, before the first step.

    Afterwards `rng_state` holds the random states, which the Trainer restores at its first step.

    trust: read .metadata with the unrestricted unpickler, which runs what it says.
    """

    def __init__(self, path: str | os.PathLike[str], *, trust: bool = False) -> None:
        self._path = Path(path)
        self._reader = reader_of(trust)
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
            load(tensors, storage_reader=self._reader(self._path), no_dist=not distributed.is_initialized())
        except CheckpointException as error:
            reasons = sorted({str(failure).splitlines()[0] for failure, _ in error.failures.values()})
            raise ValueError(f"{self._path} is of another network or optimizer: {'; '.join(reasons)}") from error
        options = StateDictOptions(strict=True)
        set_model_state_dict(state.model, tensors["model"], options=options)
        loaded: Any = {"state": tensors["optimizer"], "param_groups": param_groups}
        set_optimizer_state_dict(state.model, optimizer, loaded, options=options)


def reader_of(trust: bool) -> type[FileSystemReader]:
    """DCP's own reader for a checkpoint that is trusted, and DataOnlyReader for all others."""
    return FileSystemReader if trust else DataOnlyReader


class DataOnlyReader(FileSystemReader):
    """Reads .metadata without running what it names: anything but DCP's own records raises pickle.UnpicklingError."""

    def read_metadata(self, *args: Any, **settings: Any) -> metadata.Metadata:
        with open(Path(self.path) / _METADATA, "rb") as file:
            read = _MetadataUnpickler(file).load()
        read.storage_meta = getattr(read, "storage_meta", None) or metadata.StorageMeta()
        read.storage_meta.load_id = self.load_id  # as in FileSystemReader
        return read


# Python's own, since the one in C makes a list as long as the largest index of the memo that the file names.
class _MetadataUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if (module_name, global_name) not in _IN_METADATA:
            raise pickle.UnpicklingError(f"GLOBAL {module_name}.{global_name} is no part of DCP's metadata")
        return _IN_METADATA[module_name, global_name]


# What .metadata names: records, paths, and a function that makes a layout out of its name.
_RECORDS: tuple[Any, ...] = (
    metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.Metadata, metadata.MetadataIndex,
    metadata.StorageMeta, metadata.TensorProperties, metadata.TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, torch.serialization._get_layout, torch.Size,
)  # fmt: skip
_IN_METADATA = {
    **{(record.__module__, record.__qualname__): record for record in _RECORDS},
    **{(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")},  # the latter is Python 3.13's
}


def state_without_tensors(state: State) -> dict[str, Any]:
    """`state.state_dict` without the weights and the optimizer's state, which it would gather."""
    whole = state.serialized_attributes
    state.serialized_attributes = [name for name in whole if name not in _TENSORS]
    try:
        return state.state_dict()
    finally:
        state.serialized_attributes = whole
