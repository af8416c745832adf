"""Turns a recipe's `parallelism` into Composer's configuration, and adds what that lacks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.sharding import sharding_units
from training.engines.deepspeed.settings import check_deepspeed
from training.engines.torch_trials import fsdp2_runs_on_cpu, gloo_averages, reduce_scatter_sums
from training.optimizers import SCHEDULE_FREE
from training.planning import Place
from training.recipe import FSDP, Recipe, RecipeError

# Composer's own algorithms that fail under FSDP2 -> equivalents that work.
_NOT_UNDER_FSDP2 = {"composer.channels_last": "channels_last", "composer.ema": "ema", "composer.sam": "sam"}
_NOT_COMPRESSED = {
    "none": "averages no gradients",
    "fsdp": "takes the type of its traffic from parallelism.fsdp.mixed_precision",
    "deepspeed": "takes the type of its traffic from parallelism.deepspeed.communication_data_type",
}
_BROADCAST_BYTES = 250 * 2**20  # buffers per broadcast, as in DDP


def check_parallelism(recipe: Recipe, place: Place) -> None:
    """Raise RecipeError if the recipe's engine cannot run it at `place`."""
    strategy, train = recipe.parallelism.strategy, recipe.data.train
    device, world_size = place.device, place.world_size
    if world_size > 1 and strategy == "none":
        raise RecipeError(
            "parallelism.strategy", f"is none, and {world_size} processes were started; use ddp, or start one"
        )
    if strategy != "ddp" and recipe.parallelism.ddp.gradient_compression is not None:
        raise RecipeError(
            "parallelism.ddp.gradient_compression",
            f"is {recipe.parallelism.ddp.gradient_compression}, and parallelism.strategy is {strategy}, which "
            f"{_NOT_COMPRESSED[strategy]}; leave it out, or use ddp",
        )
    if strategy == "fsdp":
        _check_fsdp(recipe, device=device, world_size=world_size)
    elif recipe.checkpoints.sharded:
        raise RecipeError(
            "checkpoints.sharded",
            f"is true, and parallelism.strategy is {strategy}, which has no shards; set it to false",
        )
    if strategy == "deepspeed":
        check_deepspeed(recipe, device=device)
    if train.per_device_microbatch_size == "auto":
        _check_auto_microbatches(recipe, device=device)


def fsdp_config(settings: FSDP, network: nn.Module) -> dict[str, Any]:
    """The Trainer's `parallelism_config` for FSDP; marks the parts of `network` that Composer shards one by one."""
    network.fsdp_wrap_fn = _WrapUnits(network)  # pyright: ignore[reportArgumentType]: Composer looks here
    common: dict[str, Any] = {"mixed_precision": settings.mixed_precision.upper(), "state_dict_type": "full"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")  # the recipe asks for it
        if settings.version == 1:
            return {"fsdp": FSDPConfig(**common, **_fsdp1_strategy(settings))}
        common["reshard_after_forward"] = settings.reshard_after_forward
        if settings.replicas > 1:
            return {"fsdp": HybridFSDP2Config(replicas=settings.replicas, **common)}
        return {"fsdp": FSDP2Config(**common)}


class HybridFSDP2Config(FSDP2Config):
    """FSDP2 over a two-dimensional mesh: `replicas` copies of the model, each sharded over ranks / replicas ranks.

    Composer 0.32.1 replaces FSDP2Config.device_mesh with its own mesh, which is two-dimensional if the configuration
    has a number of replicas. FSDP1's configuration has that setting, FSDP2's does not.
    """

    def __init__(self, *, replicas: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._replicas = replicas

    @property
    def data_parallel_replicate_degree(self) -> int:
        """Number of copies of the model."""
        return self._replicas


class LikeDDP(Callback):
    """Makes FSDP2 and DeepSpeed match DDP: mean gradients on gloo (FSDP2), and the same buffers on all ranks.

    Gradients: if a trial shows that a reduce-scatter sums where it should average, every reduced gradient is divided by
    the number of ranks; otherwise nothing is done.

    Buffers: before each step every rank takes rank 0's, so that the evaluation, and a run resumed from rank 0's
    checkpoint, do not depend on the rank.
    """

    def before_load(self, state: State, logger: Logger) -> None:
        units = [module for module in state.model.modules() if isinstance(module, FSDPModule)]
        if units and reduce_scatter_sums(next(state.model.parameters()).device):
            for unit in units:
                unit.set_all_reduce_hook(_divide_by_ranks)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                # LearningRate adds it at the first step; loading a full state fails on a missing key.
                group.setdefault("initial_lr", group["lr"])

    def batch_start(self, state: State, logger: Logger) -> None:
        buffers = [buffer.detach() for buffer in state.model.buffers()]
        if buffers and dist.get_world_size() > 1:
            group = torch.distributed.group.WORLD
            torch.distributed._broadcast_coalesced(group, buffers, _BROADCAST_BYTES, 0)  # pyright: ignore


class _WrapUnits:
    """Whether a module is one of the network's sharding units, as of the first call."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._units: set[int] | None = None

    def __call__(self, module: nn.Module) -> bool:
        if self._units is None:  # after algorithms like BlurPool have changed the network
            self._units = {id(unit) for unit in sharding_units(self._network)}
        return id(module) in self._units


def _check_fsdp(recipe: Recipe, *, device: str, world_size: int) -> None:
    fsdp = recipe.parallelism.fsdp
    if device == "mps":
        raise RecipeError("parallelism.strategy", "is fsdp, which does not run on mps; use none")
    if fsdp.version == 1 and device != "gpu":
        raise RecipeError("parallelism.fsdp.version", f"is 1, which needs GPUs, and the device is {device}; use 2")
    if fsdp.version == 1 and recipe.optimizer["name"] in ("muon", *SCHEDULE_FREE):
        raise RecipeError(
            "parallelism.fsdp.version",
            f"is 1, which flattens weights, and optimizer {recipe.optimizer['name']} needs their shapes; use 2",
        )
    if fsdp.version == 1 and recipe.checkpoints.sharded:
        raise RecipeError("checkpoints.sharded", "is true, which needs FSDP2; set parallelism.fsdp.version=2")
    if world_size % fsdp.replicas:
        raise RecipeError(
            "parallelism.fsdp.replicas",
            f"is {fsdp.replicas}, which does not divide the {world_size} ranks; give a divisor, or 1",
        )
    if device == "cpu" and not fsdp2_runs_on_cpu():
        raise RecipeError(
            "parallelism.strategy",
            f"is fsdp, which torch {torch.__version__} runs on GPUs alone; use ddp, or install torch 2.7 or newer",
        )
    if fsdp.replicas > 1 and device == "cpu" and not gloo_averages():
        raise RecipeError(
            "parallelism.fsdp.replicas",
            f"is {fsdp.replicas}, and torch {torch.__version__} trains replicas of shards on GPUs alone; set it to 1, "
            "or install torch 2.15",
        )
    if fsdp.version == 2:
        for name in recipe.algorithms.keys() & _NOT_UNDER_FSDP2.keys():
            raise RecipeError(
                f"algorithms.{name}", f"fails under FSDP2; use algorithms.{_NOT_UNDER_FSDP2[name]}, or strategy ddp"
            )


def _check_auto_microbatches(recipe: Recipe, *, device: str) -> None:
    path = "data.train.per_device_microbatch_size"
    if device != "gpu":
        raise RecipeError(path, f"is auto, which reads a GPU's memory, and the device is {device}; give a number")
    if recipe.parallelism.strategy == "fsdp" and recipe.parallelism.fsdp.version == 2:
        raise RecipeError(path, "is auto, which Composer does not do under FSDP2; give a number, or use ddp")
    if recipe.parallelism.strategy == "deepspeed":
        raise RecipeError(path, "is auto, which is not done under deepspeed; give a number, or use ddp")


def _fsdp1_strategy(settings: FSDP) -> dict[str, Any]:
    if settings.replicas == 1:
        return {"sharding_strategy": "FULL_SHARD" if settings.reshard_after_forward else "SHARD_GRAD_OP"}
    return {
        "sharding_strategy": "HYBRID_SHARD" if settings.reshard_after_forward else "_HYBRID_SHARD_ZERO2",
        "data_parallel_replicate_degree": settings.replicas,
    }


def _divide_by_ranks(gradients: Tensor) -> None:
    # For other dtypes FSDP sums and divides by itself.
    if gradients.dtype in (torch.float32, torch.bfloat16):
        gradients.div_(dist.get_world_size())
