"""What to do when memory runs out, in one line that names the setting."""

from __future__ import annotations

import torch

from training.recipe import Recipe


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that a GPU or this machine refused."""
    # torch's allocator for CPUs raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def describe_out_of_memory(recipe: Recipe, *, device: str, per_device_batch_size: int) -> str:
    """Which settings of `recipe` take less memory; those come first that change nothing of what is trained."""
    given = recipe.data.train.per_device_microbatch_size
    images = given if isinstance(given, int) else per_device_batch_size
    repairs = [f"data.train.per_device_microbatch_size={images // 2} or less"] if images > 1 else []
    fsdp2 = recipe.parallelism.strategy == "fsdp" and recipe.parallelism.fsdp.version == 2
    if device == "gpu" and given != "auto" and not fsdp2 and recipe.parallelism.strategy != "deepspeed":
        repairs.insert(0, "data.train.per_device_microbatch_size=auto, which finds the largest that fits")
    if recipe.model.get("gradient_checkpointing") is False:
        repairs.append("model.gradient_checkpointing=true")
    if recipe.parallelism.strategy == "ddp":
        repairs.append("parallelism.strategy=fsdp")
    repairs.append("a smaller image_size")
    return (
        f"out of memory with {images} images a rank in a forward pass; set {', or '.join(repairs)} "
        f"(in evaluation: data.eval.per_device_batch_size below {recipe.data.eval.per_device_batch_size})"
    )
