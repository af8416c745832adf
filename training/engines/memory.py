"""The memory a step takes, the memory available, and what to change when it does not suffice.

A step on b images per rank takes   weights + gradients + optimizer state + copies + c + b a   bytes: the first three by
the engine's formula (`expected_bytes`), the copies by another (`copied_bytes`), a and c measured on a few images
(`step_bytes`). A measured c includes gradients, which are counted once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import resource
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from training.optimizers import build_optimizer
from training.planning import Plan

PARTS = ("parameters", "gradients", "optimizer_state")  # activations have no formula here
FLOAT32_BYTES = 4
_MEASURED_IMAGES = (2, 6)
_USABLE_SHARE = 0.8  # the rest is lost to fragmentation and threads


def expected_bytes(engine: str, *, num_parameters: int, state_bytes: float, ranks: int) -> dict[str, float]:
    """Bytes per rank, keyed by `PARTS`: P weights in float32, s bytes of optimizer state per weight, N ranks.

                            parameters  gradients  optimizer state
        none, ddp, zero0        4 P        4 P         s P
        fsdp                   4 P/N      4 P/N       s P/N
        zero1                   4 P        4 P      (s + 4) P/N
        zero2                   4 P       4 P/N     (s + 4) P/N
        zero3                  4 P/N      4 P/N     (s + 4) P/N

    ZeRO 1 to 3 update a copy of each rank's part of the weights, the 4 in s + 4 (Rajbhandari 2020, arXiv 1910.02054,
    counts it as part of K). SGD with momentum has s = 4, AdamW s = 8.
    """
    weights, state = FLOAT32_BYTES * num_parameters, state_bytes * num_parameters
    stage = int(engine.removeprefix("zero")) if engine.startswith("zero") else 0
    sharded = (stage >= 3, stage >= 2, stage >= 1) if engine != "fsdp" else (True, True, True)
    whole = (weights, weights, state + (weights if stage else 0))
    return {
        part: size / (ranks if is_sharded else 1) for part, size, is_sharded in zip(PARTS, whole, sharded, strict=True)
    }


def copied_bytes(plan: Plan, *, parameters: float, optimizer_state: float) -> float:
    """Bytes per rank of what is held beside a step, given those of the rank's weights and of their optimizer state.

    A copy of the weights each for SAM and EMA, all of a teacher's, and on a CPU what a checkpoint is written from.
    """
    copies = sum(one.name.removeprefix("composer.") in ("ema", "sam") for one in plan.algorithms)
    held = copies * parameters + FLOAT32_BYTES * plan.teacher_parameters
    if plan.place.device == "cpu" and plan.recipe.checkpoints.asynchronous:
        held += parameters + optimizer_state
    return held


def state_bytes_per_parameter(optimizer: Mapping[str, Any]) -> float:
    """s of a recipe's optimizer, measured by a step on a few weights; of muon, on one of its matrices."""
    weights = nn.Linear(64, 64, bias=False)
    weights.weight.grad = torch.ones_like(weights.weight)
    made = build_optimizer(weights, dict(optimizer), learning_rate=1e-3, matrices=("weight",))
    made.step()
    tensors = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1) / weights.weight.numel()


def step_bytes(
    network: nn.Module, *, image_size: int, device: torch.device, precision: str = "fp32"
) -> tuple[float, float]:
    """c and a: the peak of a forward and backward pass of `network` on b images is c + b a bytes.

    This counts gradients, not weights. Measured on two small batches of images [b, 3, image_size, image_size].
    Clears the gradients of `network`.
    """
    network = network.to(device).train()
    few, more = _MEASURED_IMAGES
    peaks = [
        _peak_bytes(network, torch.rand(n, 3, image_size, image_size, device=device), precision) for n in (few, more)
    ]
    per_image = (peaks[1] - peaks[0]) / (more - few)
    return max(0.0, peaks[0] - few * per_image), per_image


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate on `device`: a GPU's, or this machine's within its limits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return max(0, min(free, _unreserved_bytes(device, total)))
    rooms = (_field_bytes("/proc/meminfo", "MemAvailable"), _control_group_bytes(), _address_space_bytes())
    return min((room for room in rooms if room is not None), default=0)


def largest_batch(plan: Plan, network: nn.Module) -> tuple[int, float, float]:
    """The most images per forward pass that fit on a rank, the bytes per image, and the bytes available.

    The failed attempt's memory must be free again, see `forget`. The number is 0 if not even the weights fit.
    """
    recipe, device = plan.recipe, torch.device(plan.place.torch_device)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    engine = recipe.parallelism.strategy
    if engine == "deepspeed":
        zero = (recipe.parallelism.deepspeed or {}).get("zero_optimization") or {}
        engine = f"zero{zero.get('stage', 0)}"
    fixed = expected_bytes(
        engine,
        num_parameters=num_parameters,
        state_bytes=state_bytes_per_parameter(recipe.optimizer),
        ranks=plan.place.world_size,
    )
    available = free_bytes(device)
    constant, per_image = step_bytes(
        network, image_size=plan.largest_image_size, device=device, precision=recipe.precision
    )
    gradients = FLOAT32_BYTES * num_parameters
    constant += fixed["gradients"] - gradients  # measured unsharded, but sharded in the run
    if engine == "ddp":
        constant += gradients  # DDP's buckets
    held = fixed["parameters"] + fixed["optimizer_state"]
    held += copied_bytes(plan, parameters=fixed["parameters"], optimizer_state=fixed["optimizer_state"])
    room = _USABLE_SHARE * available - held - constant
    return max(0, math.floor(room / per_image)), per_image, available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, on a GPU or on this machine."""
    # torch's allocator for CPUs raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def forget(error: BaseException) -> None:
    """Free what the traceback frames of `error` hold: a Trainer, its network, its activations."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory


def describe_out_of_memory(plan: Plan, *, fits: tuple[int, float, float] | None) -> str:
    """Which settings of the plan's recipe take less memory; those that do not change the training come first.

    fits: the result of `largest_batch`; None if it failed.
    """
    recipe = plan.recipe
    given = recipe.data.train.per_device_microbatch_size
    images = given if isinstance(given, int) else plan.per_device_batch_size
    text = f"out of memory with {images} images a rank in a forward pass"
    repairs = []
    if fits is not None:
        number, per_image, available = fits
        if number >= images:  # another process held the memory
            number = images // 2
        text += f"; about {number} would fit, at {per_image / 1e6:.3g} MB each in {available / 1e9:.3g} GB"
        if number:
            repairs.append(f"data.train.per_device_microbatch_size={number}")
    fsdp2 = recipe.parallelism.strategy == "fsdp" and recipe.parallelism.fsdp.version == 2
    if plan.place.device == "gpu" and given != "auto" and not fsdp2 and recipe.parallelism.strategy != "deepspeed":
        repairs.append("data.train.per_device_microbatch_size=auto")
    if recipe.model.get("gradient_checkpointing") is False:
        repairs.append("model.gradient_checkpointing=true")
    if recipe.parallelism.strategy == "ddp":
        repairs.append("parallelism.strategy=fsdp")
    repairs.append("a smaller image_size")
    return (
        f"{text}; set {', or '.join(repairs)} "
        f"(in evaluation: data.eval.per_device_batch_size below {recipe.data.eval.per_device_batch_size})"
    )


def _peak_bytes(network: nn.Module, images: torch.Tensor, precision: str) -> int:
    """Peak bytes of a forward and backward pass, beyond what was allocated before."""
    network.zero_grad(set_to_none=True)
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        _forward_and_backward(network, images, precision)
        peak = torch.cuda.max_memory_allocated(images.device) - before
        network.zero_grad(set_to_none=True)
        return peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # otherwise it warns that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _forward_and_backward(network, images, precision)
    held = peak = 0
    for event in sorted(_memory_events(profiled), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    network.zero_grad(set_to_none=True)
    return peak


def _memory_events(profiled: Any) -> list[Any]:
    return [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]


def _forward_and_backward(network: nn.Module, images: torch.Tensor, precision: str) -> None:
    from composer.core.precision import get_precision_context  # here, so that the formulas alone do not need Composer

    with get_precision_context(precision):
        loss = network(images).float().logsumexp(dim=1).mean()
    loss.backward()


def _unreserved_bytes(device: torch.device, total: int) -> int:
    """What torch.cuda.set_per_process_memory_fraction leaves this process, which the driver does not know."""
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not every torch tells it
    return total if fraction is None else int(total * fraction(device)) - torch.cuda.memory_reserved(device)


def _address_space_bytes() -> int | None:
    """What `ulimit -v` leaves this process, plus malloc's free blocks."""
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _field_bytes("/proc/self/status", "VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    unused = 0
    with contextlib.suppress(OSError, AttributeError):  # glibc before 2.33, or another library
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = _MallocInfo
        unused = mallinfo().fordblks
    return limit - used + unused


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2; fordblks are bytes in free blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _control_group_bytes() -> int | None:
    """What this container can still allocate (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)


def _field_bytes(table: str, field: str) -> int | None:
    """A field of a Linux table that is in KiB, in bytes."""
    try:
        lines = Path(table).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
