"""Measures one rank over a few steps under one engine; `training.engines.compare` starts it.

parameters, gradients, optimizer_state   bytes of this rank's own tensors, each storage counted once, just before a
                                         step (gradients) and after it
activations                              bytes added between the start of the batch and the first backward pass: what
                                         is kept for that pass, and gathered weights
resident_peak / device_peak              the process's peak memory, from the system; on a GPU, that of its tensors
step_seconds                             from the start of the batch to the updated weights, for each measured step
communication_seconds                    time in collectives of one further step: overlapping ones count once
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from training.build import build_loaders
from training.engines.composer import build_trainer
from training.engines.ranks.start import start_distributed
from training.planning import choose_place, plan_run
from training.recipe import Recipe, recipe_from

_WARM_UP_STEPS = 2
_BACKWARD = "engine_probe: backward"
# Where DeepSpeed 0.19's optimizers keep reduced gradients between the backward pass and the step: ZeRO 1 and 2 for the
# weights of their part, ready and not yet ready for use; ZeRO 1 and 2 with offloading; ZeRO-3.
_ZERO_GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "accumulated_grads_in_cpu",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)
_COLLECTIVES = ("gloo:", "nccl:", "nccldevkernel")


class _Done(Exception):
    """The measurement is complete."""


class Probe(Callback):
    """Measures from inside a run, and ends it by raising _Done. See the module's docstring for `result`.

    steps: number of timed steps, after two that are not timed.
    """

    def __init__(self, *, steps: int) -> None:
        self.zero: Any = None  # DeepSpeed's optimizer
        self.result: dict[str, Any] = {"step_seconds": []}
        self._steps = steps
        self._started = 0.0
        self._profile: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        done = state.timestamp.batch.value
        if done == _WARM_UP_STEPS + self._steps:
            self._profile = profile(activities=_activities(), profile_memory=True)
            self._profile.__enter__()
        dist.barrier()
        self._started = _now()

    def before_backward(self, state: State, logger: Logger) -> None:
        if self._profile is not None:
            with record_function(_BACKWARD):
                pass

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.result["gradients"] = _bytes(_gradients(state, self.zero))

    def batch_end(self, state: State, logger: Logger) -> None:
        seconds = _now() - self._started
        if self._profile is None:
            if state.timestamp.batch.value > _WARM_UP_STEPS:
                self.result["step_seconds"].append(seconds)
            return
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        self.result |= {
            "profiled_seconds": seconds,
            "communication_seconds": _communication_seconds(events),
            "activations": _bytes_before_backward(events),
            "num_parameters": sum(getattr(one, "ds_numel", one.numel()) for one in state.model.parameters()),
            "parameters": _bytes(_parameters(state)),
            "optimizer_state": _bytes(_optimizer_state(state, self.zero)),
            "resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        raise _Done


def probe(recipe: Recipe, *, steps: int) -> dict[str, Any]:
    """Train `recipe` for a few steps on this rank; returns the measurements."""
    place = choose_place(recipe)
    start_distributed(recipe, place)
    plan = plan_run(recipe, place)
    loaders = build_loaders(plan, rank=dist.get_global_rank(), say=lambda text: None)
    callback = Probe(steps=steps)
    try:
        if recipe.parallelism.strategy == "deepspeed":
            from training.engines.deepspeed.run import DeepSpeedRun

            run = DeepSpeedRun(plan, loaders, callbacks=[callback])
            callback.zero = run.engine.optimizer
            run.fit(lambda text: None)
        else:
            build_trainer(plan, loaders, callbacks=[callback], load_path=None).fit()
    except _Done:
        pass
    if "activations" not in callback.result:
        raise ValueError(
            f"the recipe ends before {_WARM_UP_STEPS + steps + 1} steps; lower --steps, or give it more epochs"
        )
    return callback.result


def _parameters(state: State) -> Iterable[Tensor]:
    for parameter in state.model.parameters():
        yield parameter
        part = getattr(parameter, "ds_tensor", None)  # ZeRO-3's
        if part is not None:
            yield part


def _gradients(state: State, zero: Any) -> Iterable[Tensor]:
    yield from (parameter.grad for parameter in state.model.parameters() if parameter.grad is not None)
    for attribute in _ZERO_GRADIENTS:
        yield from _tensors(getattr(zero, attribute, None))
    yield from (part.grad for part in _zero_weights(zero) if part.grad is not None)  # with the optimizer offloaded


def _optimizer_state(state: State, zero: Any) -> Iterable[Tensor]:
    for optimizer in state.optimizers:
        for values in optimizer.state.values():
            yield from _tensors(values)
    yield from _zero_weights(zero)


def _zero_weights(zero: Any) -> Iterable[Tensor]:
    """The copy of this rank's part of the weights that ZeRO updates."""
    yield from _tensors(getattr(zero, "single_partition_of_fp32_groups", []))  # ZeRO 1 and 2
    yield from _tensors(getattr(zero, "fp32_partitioned_groups_flat", []))  # ZeRO-3


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from (tensor for value in values.values() for tensor in _tensors(value))
    elif isinstance(values, (list, tuple)):
        yield from (tensor for value in values for tensor in _tensors(value))


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)  # pyright: ignore
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in local)}
    return sum(storages.values())


def _bytes_before_backward(events: Any) -> int:
    begins = min(event.start_ns() for event in events if event.name() == _BACKWARD)
    on_gpu = torch.cuda.is_available()
    return sum(
        event.nbytes()
        for event in events
        if event.name() == "[memory]"
        and event.start_ns() <= begins
        and (event.device_type() == torch.autograd.DeviceType.CUDA) == on_gpu  # pyright: ignore[reportPrivateImportUsage]
    )


def _communication_seconds(events: Any) -> float:
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().lower().startswith(_COLLECTIVES)
    )
    total = end = 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e9


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str]) -> int:
    """arguments: a JSON file with the recipe and the number of steps, and the output file."""
    given = json.loads(Path(arguments[0]).read_text())
    try:
        result = probe(recipe_from(given["recipe"]), steps=given["steps"])
    except (ValueError, OSError) as error:
        Path(arguments[1]).write_text(json.dumps({"refused": str(error)}))
        return 2
    Path(arguments[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
