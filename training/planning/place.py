"""Where a recipe runs: which device, on how many ranks, and whether they can do what it asks."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from training.recipe import Recipe, RecipeError
from training.recipe.compiling import CUDA_GRAPH_MODES


@dataclass(frozen=True)
class Place:
    """Where a recipe runs: one rank's device (cpu, gpu, mps), and the number of ranks."""

    device: str
    world_size: int = 1

    @property
    def torch_device(self) -> str:
        """torch's name for the device."""
        return {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}[self.device]


def choose_place(recipe: Recipe, *, world_size: int | None = None) -> Place:
    """The recipe's device on this machine, and the number of ranks that a launcher started.

    Raises RecipeError if the requested device is missing, or does not support what the recipe needs.
    """
    present = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if recipe.device == "auto":
        device = next(name for name in ("gpu", "mps", "cpu") if present[name])
    elif present[recipe.device]:
        device = recipe.device
    else:
        here = ", ".join(name for name, there in present.items() if there)
        raise RecipeError("device", f"is {recipe.device}, which this machine does not have; here: {here}, or auto")
    if device == "cpu" and recipe.precision != "fp32":
        raise RecipeError("precision", f"is {recipe.precision}, which Composer does not train in on a CPU; use fp32")
    if recipe.compile is not None:
        _check_compile(recipe, recipe.compile.mode, device=device)
    return Place(device, int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)


def _check_compile(recipe: Recipe, mode: str, *, device: str) -> None:
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RecipeError("compile", "is true, which takes a C++ compiler on a CPU; install g++, or set compile=false")
    if device != "gpu" and mode == "reduce-overhead":
        raise RecipeError(
            "compile.mode", f"is {mode}, which records CUDA graphs, and the device is {device}; use default"
        )
    if device != "gpu" or mode not in CUDA_GRAPH_MODES:
        return
    instead = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    if recipe.data.train.per_device_microbatch_size is not None:
        raise RecipeError(
            "compile.mode",
            f"is {mode}, whose CUDA graphs write each microbatch's gradients over those of the one before, and "
            f"data.train.per_device_microbatch_size is set; use {instead}, or set that to null",
        )
    if recipe.parallelism.strategy == "fsdp":
        raise RecipeError(
            "compile.mode",
            f"is {mode}, whose CUDA graphs read weights at fixed addresses, and parallelism.strategy is fsdp, which "
            f"gathers them anew at each step; use {instead}, or ddp",
        )
