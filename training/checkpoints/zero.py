"""A checkpoint of a DeepSpeed run, as a folder.

    deepspeed.json   the run that wrote it: the number of ranks, the ZeRO stage
    zero/            DeepSpeed's own files: each rank's part of the weights and of the optimizer's state
    state.pt         the rest of the run's state, and every rank's random state

DeepSpeed reads its files with torch's unrestricted unpickler: read them within training.checkpoints.reading, which
makes torch.load read data and `classes_in_zero` only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from training.checkpoints.sharded import state_without_tensors
from training.recipe import RecipeError

_WRITER, _TAG, _STATE = "deepspeed.json", "zero", "state.pt"


def is_zero(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a checkpoint of a DeepSpeed run."""
    return (Path(path) / _WRITER).is_file()


def classes_in_zero() -> tuple[Any, ...]:
    """The classes of DeepSpeed that its files name. None of them runs code when it is created."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address


def save_zero(engine: Any, state: State, folder: Path, *, settings: dict[str, Any]) -> None:
    """Write the run's whole state to the new folder `folder`. Every rank must call this.

    settings: values that a run resumed from it must share.
    """
    rest, random_state = state_without_tensors(state), reproducibility.get_rng_state()
    if dist.get_global_rank() == 0:
        folder.mkdir()
        torch.save({"state": rest, "rng": random_state}, folder / _STATE)
        (folder / _WRITER).write_text(json.dumps(settings))
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)  # begins and ends with a barrier
    if dist.get_global_rank() == 0:
        for file in filter(Path.is_file, folder.rglob("*")):
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def load_zero(engine: Any, state: State, logger: Logger, folder: Path, *, settings: dict[str, Any]) -> None:
    """Restore `engine` and `state` from what `save_zero` wrote to `folder`. Every rank must call this.

    Raises RecipeError for a checkpoint of another engine, or with other `settings`.
    """
    _check_writer(folder, settings)
    run_name = state.run_name
    engine.load_checkpoint(str(folder), tag=_TAG)
    saved = torch.load(folder / _STATE, map_location="cpu", weights_only=False)
    state.load_state_dict(saved["state"], logger)
    state.run_name = run_name
    reproducibility.load_rng_state(saved["rng"])


def read_zero_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight and buffer of the network, unsharded, float32, on the CPU. One process reads all ranks' files."""
    settings = json.loads((folder / _WRITER).read_text())
    if settings["zero_stage"] == 0:
        saved = torch.load(folder / _TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return dict(saved["module"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG) or {})


def _check_writer(folder: Path, settings: dict[str, Any]) -> None:
    if not is_zero(folder):
        raise RecipeError(
            "load",
            f"is {folder}, which another engine wrote; continue under that engine, or start from its weights: "
            "python -m training.checkpoints.export, then model.weights",
        )
    written = json.loads((folder / _WRITER).read_text())
    for key, value in settings.items():
        if written.get(key) != value:
            raise RecipeError(
                "load",
                f"is {folder}, whose {key} is {written.get(key)}, and here it is {value}; continue as it was, or start "
                "from its weights: python -m training.checkpoints.export, then model.weights",
            )
