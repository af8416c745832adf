"""The network's weights in a checkpoint of any engine: a file, a folder of shards, or DeepSpeed's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from algos.ema import averages_in
from models.weights import plain_tensors, read_weights
from training.checkpoints.reading import check_checkpoint, reading
from training.checkpoints.sharded import is_sharded, reader_of
from training.checkpoints.zero import is_zero, read_zero_weights
from training.optimizers.schedule_free import averages_of, is_schedule_free, statistics_at_averages
from training.recipe import RecipeError

_PREFIX = "module."  # of the network within ImageClassifier


def find_checkpoint(source: str | os.PathLike[str], *, names: Sequence[str] = ("latest.pt",)) -> Path:
    """A checkpoint: `source` itself, or the first of `names` that a run's folder `source` has.

    Raises ValueError if there is none.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} is not there; give results/RUN, or a checkpoint within it")
    for path in (*(source / "checkpoints" / name for name in names), source):
        if path.is_file() or (path.is_dir() and (is_zero(path) or is_sharded(path))):
            return path
    raise ValueError(f"{source} is no checkpoint, and no run's folder that holds one; give results/RUN")


def read_network_weights(
    checkpoint: Path, *, trust: bool = False, averaged: bool = True
) -> tuple[dict[str, Tensor], bool]:
    """The network's weights and buffers under its own names, contiguous; and whether they are averages: EMA's,
    or a schedule-free optimizer's.

    trust: read with Python's unrestricted unpickler, which runs what the file says.
    averaged: return the averages where the checkpoint has them, as the run's evaluations do.

    Raises RecipeError for a checkpoint that is damaged or names code.
    """
    if not trust:
        check_checkpoint(checkpoint)
    try:
        with reading(checkpoint, trust=trust):
            tensors = {name.removeprefix(_PREFIX): value for name, value in _read(checkpoint, trust).items()}
            averages = plain_tensors(_read_averages(checkpoint, trust), str(checkpoint)) if averaged else {}
    except (ValueError, OSError, ModuleNotFoundError):
        raise
    except (Exception, CheckpointException) as error:  # whole and data only, but not what a run writes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecipeError("load", f"is {checkpoint}, which no run wrote ({reason}); give another") from None
    kept = {name.removeprefix(_PREFIX): value for name, value in averages.items()}
    for name in kept:
        tensors[name] = kept[name].to(tensors[name])
    return {name: value.contiguous() for name, value in tensors.items()}, bool(kept)


def _read(checkpoint: Path, trust: bool) -> dict[str, Tensor]:
    if is_zero(checkpoint):
        return read_zero_weights(checkpoint)
    if is_sharded(checkpoint):
        return _read_shards(checkpoint, reader_of(trust))
    return read_weights(str(checkpoint), trust=trust)


def _read_averages(checkpoint: Path, trust: bool) -> dict[str, Tensor]:
    """EMA's or a schedule-free optimizer's, by the Trainer's names. DeepSpeed does not run the latter."""
    if checkpoint.suffix == ".safetensors":
        return {}
    in_folder = is_zero(checkpoint) or is_sharded(checkpoint)
    file = checkpoint / "state.pt" if in_folder else checkpoint
    saved = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    averages = averages_in(saved)  # whole on every rank
    if averages or is_zero(checkpoint):
        return averages
    return _read_sharded_averages(checkpoint, saved, reader_of(trust)) if in_folder else _schedule_free_averages(saved)


def _schedule_free_averages(saved: dict[str, Any]) -> dict[str, Tensor]:
    for optimizer in (saved["state"].get("optimizers") or {}).values():
        if is_schedule_free(optimizer["param_groups"]):
            z = {name: state["z"] for name, state in optimizer["state"].items() if "z" in state}
            weights = averages_of(saved["state"]["model"], z, optimizer["param_groups"])
            return {**weights, **statistics_at_averages(saved["state"])}
    return {}


def _read_sharded_averages(folder: Path, saved: dict[str, Any], reader: type[FileSystemReader]) -> dict[str, Tensor]:
    if not is_schedule_free(saved["param_groups"]):
        return {}
    prefix, suffix = "optimizer.", ".z"
    tensors = _read_shards(folder, reader, prefix=prefix)
    z = {name.removesuffix(suffix): value for name, value in tensors.items() if name.endswith(suffix)}
    weights = averages_of(_read_shards(folder, reader), z, saved["param_groups"])
    return {**weights, **statistics_at_averages(saved["state"])}


def _read_shards(folder: Path, reader: type[FileSystemReader], *, prefix: str = "model.") -> dict[str, Tensor]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = reader(folder).read_metadata().state_dict_metadata
    declared = sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for entry in entries.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    there = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if declared > there:
        raise RecipeError(
            "load", f"is {folder}, whose files have {there} bytes of the {declared} that they declare; give another"
        )
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader(folder), no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
