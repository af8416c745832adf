"""Checks `parallelism.deepspeed`, and builds DeepSpeed's configuration from it and from the recipe.

The section holds DeepSpeed's own JSON keys. Keys that other sections of a recipe set are refused by name, so that a
recipe means the same under every engine.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from training.recipe import Recipe
from training.recipe.schema import RecipeError, parse

ALGORITHMS = (
    "blurpool", "channels_last", "cutmix", "ema", "fixres", "label_smoothing", "mixup", "patch_dropout",
    "progressive_resizing", "randaugment", "sam", "stochastic_depth",
)  # fmt: skip

_PATH = "parallelism.deepspeed"


@dataclass
class _Settings:
    """DeepSpeed's keys that a recipe may set: how work is divided and reported, not what is trained."""

    zero_optimization: Any = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0
    disable_python_gc: bool = False
    comms_logger: Any = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False


# DeepSpeed's key -> the recipe's equivalent, for every engine.
_ELSEWHERE = {
    "activation_checkpointing": "model.gradient_checkpointing",
    "bf16": "precision=amp_bf16",
    "bfloat16": "precision=amp_bf16",
    "checkpoint": "checkpoints",
    "dataloader_drop_last": "data.train.drop_last",
    "fp16": "precision=amp_fp16",
    "gradient_accumulation_steps": "data.train.per_device_microbatch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "torch_autocast": "precision",
    "train_batch_size": "data.train.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.train.per_device_microbatch_size",
}
_TORCHS = ("adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd")
# ZeRO gives an optimizer flat partitions that may start and end inside a weight. These treat each element separately.
_ELEMENTWISE = {"adamw", "decoupled_adamw", "decoupled_sgdw", "sgd", *(f"torch.{name}" for name in _TORCHS)}
_NEEDS_WHOLE_WEIGHTS = {  # which ZeRO stage 3 has only while their layer computes
    "ema": "averages and swaps all weights between steps",
    "sam": "moves all weights between its two passes",
}
_OTHER_WEIGHTS = "keeps other weights for evaluation than for training, which DeepSpeed holds in copies of its own"
_NOT_HERE = {
    "muon": "updates whole matrices, and DeepSpeed gives an optimizer flat pieces of them",
    "schedule_free_adamw": _OTHER_WEIGHTS,
    "schedule_free_sgd": _OTHER_WEIGHTS,
}
_AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_OFFLOADS = ("offload_optimizer", "offload_param")


def zero_stage(recipe: Recipe) -> int:
    """0 to 3: how much ZeRO shards (nothing; optimizer state; gradients too; weights too)."""
    return _zero_settings(recipe).get("stage", 0)


def offloads(recipe: Recipe) -> list[str]:
    """Which of offload_optimizer and offload_param are on."""
    zero = _zero_settings(recipe)
    return [key for key in _OFFLOADS if (zero.get(key) or {}).get("device", "none") != "none"]


def check_deepspeed(recipe: Recipe, *, device: str) -> None:
    """Raise RecipeError for what DeepSpeed cannot run or other sections set; device: cpu, gpu, mps."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "parallelism.strategy", "is deepspeed, which is not installed: pip install 'brisk-vision[deepspeed]'"
        )
    if device == "mps":
        raise RecipeError("parallelism.strategy", "is deepspeed, which does not run on mps; use none")
    for name in recipe.algorithms:
        if name not in ALGORITHMS:
            raise RecipeError(
                f"algorithms.{name}",
                f"does not run under deepspeed, which takes {', '.join(ALGORITHMS)}; set algorithms.{name}=null, or "
                "parallelism.strategy=ddp or fsdp",
            )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported; otherwise it picks any device
    _check_keys(recipe)
    _check_zero(recipe)
    if recipe.optimizer["name"] in _NOT_HERE:
        raise RecipeError(
            "optimizer.name",
            f"is {recipe.optimizer['name']}, which {_NOT_HERE[recipe.optimizer['name']]}; use parallelism.strategy ddp "
            f"or fsdp, or an optimizer such as {', '.join(sorted(_ELEMENTWISE)[:4])}",
        )
    stage = zero_stage(recipe)
    _check_algorithms_of(recipe, stage)
    if stage and recipe.optimizer["name"] not in _ELEMENTWISE:
        raise RecipeError(
            "optimizer.name",
            f"is {recipe.optimizer['name']}, which is not known to treat each element of a weight alone, and ZeRO "
            f"stage {stage} cuts weights into flat pieces; use one of {', '.join(sorted(_ELEMENTWISE))}, or stage 0",
        )


def _check_algorithms_of(recipe: Recipe, stage: int) -> None:
    for name, what in _NEEDS_WHOLE_WEIGHTS.items():
        if stage == 3 and name in recipe.algorithms:
            raise RecipeError(
                f"algorithms.{name}",
                f"{what}, and ZeRO stage 3 has a weight whole only while its layer computes; set algorithms.{name}="
                "null, or zero_optimization.stage to 0, 1 or 2",
            )
    if "sam" in recipe.algorithms and recipe.precision == "amp_fp16":
        raise RecipeError(
            "algorithms.sam",
            "runs its first pass without DeepSpeed's loss scale, which amp_fp16 needs; use precision=amp_bf16 or fp32, "
            "or parallelism.strategy=ddp",
        )


def deepspeed_config(recipe: Recipe, *, per_device_batch_size: int) -> dict[str, Any]:
    """The configuration for deepspeed.initialize, for a recipe that passed `check_deepspeed`."""
    batch = per_device_batch_size
    microbatch = recipe.data.train.per_device_microbatch_size or batch
    assert isinstance(microbatch, int), "auto is refused"
    config: dict[str, Any] = {
        **(recipe.parallelism.deepspeed or {}),
        "train_micro_batch_size_per_gpu": min(microbatch, batch),
        "gradient_accumulation_steps": math.ceil(batch / microbatch),
        # step() ends a batch after any number of microbatches: stages and last batches differ in size.
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optimizer["clip_norm"] or 0.0,  # by default DeepSpeed 0.19 clips to 1
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if recipe.precision in _AUTOCAST:
        config["torch_autocast"] = {"enabled": True, "dtype": _AUTOCAST[recipe.precision]}
    return config


def _zero_settings(recipe: Recipe) -> dict[str, Any]:
    return (recipe.parallelism.deepspeed or {}).get("zero_optimization") or {}


def _check_keys(recipe: Recipe) -> None:
    settings = recipe.parallelism.deepspeed
    for key in settings if isinstance(settings, dict) else ():
        if key in _ELSEWHERE:
            raise RecipeError(f"{_PATH}.{key}", f"is what {_ELSEWHERE[key]} says, for every engine; give that instead")
    given = parse(_Settings, settings, path=_PATH)
    if given["gradient_predivide_factor"] <= 0:
        raise RecipeError(
            f"{_PATH}.gradient_predivide_factor", f"is {given['gradient_predivide_factor']:g}; it must be above 0"
        )
    from deepspeed.comm.config import CommsLoggerConfig

    _check_with(CommsLoggerConfig, given["comms_logger"], path=f"{_PATH}.comms_logger")


def _check_zero(recipe: Recipe) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    path, settings = f"{_PATH}.zero_optimization", (recipe.parallelism.deepspeed or {}).get("zero_optimization")
    _check_with(DeepSpeedZeroConfig, settings, path=path)
    stage = zero_stage(recipe)
    if stage not in range(4) or isinstance(stage, bool):
        raise RecipeError(f"{path}.stage", f"is {stage!r}; it must be 0, 1, 2 or 3")
    if _zero_settings(recipe).get("zenflow") is not None:
        raise RecipeError(f"{path}.zenflow", "applies some gradients late, which trains otherwise; leave it out")
    for key in _OFFLOADS:
        _check_offload(recipe, key, path=f"{path}.{key}")


def _check_with(model: Any, settings: Any, *, path: str) -> None:
    """Raise RecipeError for settings that `model`, a pydantic model of DeepSpeed's, does not accept."""
    from pydantic import ValidationError

    if settings is not None and not isinstance(settings, dict):
        raise RecipeError(path, f"is {settings!r}; it must be a mapping of DeepSpeed's keys, or null")
    _refuse_old_names(model, settings or {}, path=path)
    try:
        model(**(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (path, *first["loc"])))
        if first["type"] == "extra_forbidden":
            raise RecipeError(where, f"unknown key (given {first['input']!r}); allowed: {_fields(model)}") from None
        raise RecipeError(where, f"is {first['input']!r}, which DeepSpeed does not take: {first['msg']}") from None


def _refuse_old_names(model: Any, settings: dict[str, Any], *, path: str) -> None:
    for name, extra in _extras(model).items():
        if name in settings and extra.get("deprecated"):
            raise RecipeError(f"{path}.{name}", f"is an old name; give {extra.get('new_param') or 'none of it'}")


def _fields(model: Any) -> str:
    return ", ".join(sorted(name for name, extra in _extras(model).items() if not extra.get("deprecated")))


def _extras(model: Any) -> dict[str, dict[str, Any]]:
    """DeepSpeed's notes on each key, by the key's name in a configuration."""
    return {field.alias or name: field.json_schema_extra or {} for name, field in model.model_fields.items()}


def _check_offload(recipe: Recipe, key: str, *, path: str) -> None:
    settings = _zero_settings(recipe).get(key)
    if settings is None:
        return
    if not isinstance(settings, dict) or settings.get("device", "none") not in ("none", "cpu"):
        raise RecipeError(path, f"is {settings!r}; it must be {{device: cpu}} or {{device: none}}")
    least = 3 if key == "offload_param" else 1
    if settings.get("device", "none") == "cpu" and zero_stage(recipe) < least:
        raise RecipeError(path, f"needs ZeRO stage {least} or more, and the stage is {zero_stage(recipe)}; raise it")
