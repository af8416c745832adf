"""What `parallelism.deepspeed` may say, and the configuration that DeepSpeed gets from it and from the recipe.

The section holds DeepSpeed's own JSON keys. What other sections of a recipe say is refused there by name, so that a
recipe means the same under every engine.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

from training.recipe import Recipe
from training.schema import RecipeError, refuse_unknown

ALGORITHMS = ("blurpool", "channels_last", "cutmix", "label_smoothing", "mixup", "progressive_resizing")

_PATH = "parallelism.deepspeed"
_KEYS = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "disable_python_gc",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)
# DeepSpeed's key -> what says the same in a recipe, for every engine.
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
# ZeRO hands an optimizer flat pieces that may begin and end within a weight. These never look beyond a single element.
_ELEMENTWISE = {"adamw", "decoupled_adamw", "decoupled_sgdw", "sgd", *(f"torch.{name}" for name in _TORCHS)}
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
    """Raise RecipeError for what DeepSpeed cannot run, or what the recipe says elsewhere; device: cpu, gpu, mps."""
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
    _check_keys(recipe)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported; else it takes what it finds
    _check_zero(recipe)
    stage = zero_stage(recipe)
    if stage and recipe.optimizer["name"] not in _ELEMENTWISE:
        raise RecipeError(
            "optimizer.name",
            f"is {recipe.optimizer['name']}, which is not known to treat each element of a weight alone, and ZeRO "
            f"stage {stage} cuts weights into flat pieces; use one of {', '.join(sorted(_ELEMENTWISE))}, or stage 0",
        )


def deepspeed_config(recipe: Recipe, *, per_device_batch_size: int) -> dict[str, Any]:
    """The configuration that deepspeed.initialize takes, for a recipe that `check_deepspeed` has passed."""
    batch = per_device_batch_size
    microbatch = recipe.data.train.per_device_microbatch_size or batch
    assert isinstance(microbatch, int), "auto is refused"
    config: dict[str, Any] = {
        **(recipe.parallelism.deepspeed or {}),
        "train_micro_batch_size_per_gpu": min(microbatch, batch),
        "gradient_accumulation_steps": math.ceil(batch / microbatch),
        # step() ends a batch, however many microbatches it took: stages and last batches differ in size.
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optimizer["clip_norm"] or 0.0,  # left out, DeepSpeed 0.19 clips to 1
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
    if settings is not None and not isinstance(settings, dict):
        raise RecipeError(_PATH, f"is {settings!r}; it must be a mapping of DeepSpeed's JSON keys, or null")
    for key in settings or {}:
        if key in _ELSEWHERE:
            raise RecipeError(f"{_PATH}.{key}", f"is what {_ELSEWHERE[key]} says, for every engine; give that instead")
        refuse_unknown(key, _KEYS, path=f"{_PATH}.{key}", what="key of DeepSpeed's that a recipe may set")


def _check_zero(recipe: Recipe) -> None:
    from pydantic import ValidationError

    path, settings = f"{_PATH}.zero_optimization", (recipe.parallelism.deepspeed or {}).get("zero_optimization")
    if settings is not None and not isinstance(settings, dict):
        raise RecipeError(path, f"is {settings!r}; it must be a mapping, for example {{stage: 2}}")
    stage = zero_stage(recipe)
    if stage not in range(4) or isinstance(stage, bool):
        raise RecipeError(f"{path}.stage", f"is {stage!r}; it must be 0, 1, 2 or 3")
    for key in _OFFLOADS:
        _check_offload(recipe, key, path=f"{path}.{key}")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (path, *first["loc"])))
        raise RecipeError(
            where, f"(given {first.get('input')!r}) is not what DeepSpeed takes: {first['msg']}"
        ) from None


def _check_offload(recipe: Recipe, key: str, *, path: str) -> None:
    settings = _zero_settings(recipe).get(key)
    if settings is None:
        return
    if not isinstance(settings, dict) or settings.get("device", "none") not in ("none", "cpu"):
        raise RecipeError(path, f"is {settings!r}; it must be {{device: cpu}} or {{device: none}}")
    least = 3 if key == "offload_param" else 1
    if settings.get("device", "none") == "cpu" and zero_stage(recipe) < least:
        raise RecipeError(path, f"needs ZeRO stage {least} or more, and the stage is {zero_stage(recipe)}; raise it")
