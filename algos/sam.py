"""Sharpness-aware minimization: the gradient is taken at the worst point near the weights.

Foret 2021 (arXiv 2010.01412); the scale-invariant form is Kwon 2021 (arXiv 2102.11600).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from .framework.base import (
    Contract,
    Event,
    Logger,
    Resource,
    SpeedUp,
    State,
    act_last,
    precision_context,
    world_size,
)
from .framework.batches import count_samples
from .framework.randomness import MicrobatchDraws, microbatch_draws
from .framework.shards import is_sharded, local_part

Perturbation = Literal["global", "per_rank"]

_untyped: Any = torch  # torch's type stubs lack the functions that work on lists of tensors


def sam_gradients(
    parameters: Iterable[Tensor], second_pass: Callable[[], Any], *, rho: float = 0.05, adaptive: bool = False
) -> None:
    """Replace the gradients of `parameters` with those at w + e, leaving w unchanged, bit for bit.

        e = rho g / ||g||_2                       adaptive: e = rho w^2 g / || |w| g ||_2

    with g the gradients that `parameters` hold now and the norm taken over all of them. Call it between `backward()`
    and the optimizer's step. A scale that all gradients share (a GradScaler's) does not change e.

    parameters: those without a gradient are not moved. DTensors (FSDP2's) count with all of their shards.
    second_pass: runs the same batch forward and backward again and leaves its gradients in `.grad`. Random layers must
        repeat their draws, and `frozen_statistics` keeps batch norm from counting the batch twice; `SAM` does both.
    rho: radius of the neighborhood, above 0.

    The only extra memory is a copy of the parameters while `second_pass` runs: e replaces the gradients in place.
    Raises ValueError for a rho that is not above 0, and when no parameter has a gradient.
    """
    _check_rho(rho)
    perturbed = [parameter for parameter in parameters if parameter.grad is not None]
    if not perturbed:
        raise ValueError("received no parameter with a gradient; run forward and backward() before sam_gradients")
    originals = _perturb(perturbed, rho=rho, adaptive=adaptive)
    try:
        for parameter in perturbed:
            parameter.grad = None
        second_pass()
    finally:
        with torch.no_grad():
            _untyped._foreach_copy_(_shards(perturbed), originals)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """On exit, restores the running statistics of `model`'s norm layers from entry, bit for bit.

    Inside, layers in training mode normalize with the batch's statistics as always. The copy is small: some numbers
    per channel.
    """
    # Not by disabling track_running_stats: instance norms would still update, and torch.compile would recompile the
    # model.
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase)
        for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


class SAM(SpeedUp):
    """Makes every `interval`-th step sharpness-aware, at the cost of a second forward and backward pass.

    rho: radius of the neighborhood, in the parameters' own norm (0.05 in the paper; Composer's recipes use 0.5 at
        interval 10).
    adaptive: ASAM, whose neighborhood scales with each weight (rho about ten times larger).
    interval: steps from one sharpness-aware step to the next; 1 means every step. The run's first step is one.
    perturbation: "global" takes e from the gradient averaged over ranks, so a run is the same on any number of them;
        "per_rank" takes it from each rank's own, which saves the first pass's all-reduce and is the paper's
        m-sharpness. It needs DDP.

    The optimizer is unchanged: checkpoints hold it under its own name. Metrics and the logged loss are those of the
    first pass. Both passes use the same microbatches, as other algorithms left them, and the same dropout masks (of
    torch's generators). Gradient clipping and everything else that acts on gradients gets those at w + e, wherever it
    is in the list.

    Before the first step it refuses a second SAM, losses interpolated between targets (the second pass cannot repeat
    that), FSDP1, whose shards do not give the whole gradient's norm, and per_rank on several ranks without DDP.
    """

    contract = Contract(
        owns=[Resource.GRADIENTS], after=[Resource.IMAGES, Resource.TARGETS, Resource.SAMPLES, Resource.LOSS]
    )
    events = (
        Event.FIT_START,
        Event.BATCH_START,
        Event.BEFORE_TRAIN_BATCH,
        Event.BEFORE_FORWARD,
        Event.BEFORE_LOSS,
        Event.AFTER_BACKWARD,
        Event.AFTER_TRAIN_BATCH,
    )

    def __init__(
        self,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        perturbation: Perturbation = "global",
    ) -> None:
        _check_rho(rho)
        if interval < 1:
            raise ValueError(
                f"sam.interval is {interval}; it must be at least 1 step: 1 makes every step sharpness-aware"
            )
        if perturbation not in ("global", "per_rank"):
            raise ValueError(f"sam.perturbation is {perturbation!r}; it must be global or per_rank")
        self.rho = rho
        self.adaptive = adaptive
        self.interval = interval
        self.perturbation: Perturbation = perturbation
        self._first_pass: list[_Microbatch] = []
        self._num_samples = 0  # in this rank's batch
        self._mean_num_samples = 0.0  # per batch, over ranks
        self._forward: Callable[[Any], Any] | None = None
        self._backward: Callable[[Tensor], Any] | None = None

    def compute_second_pass_with(self, forward: Callable[[Any], Any], backward: Callable[[Tensor], Any]) -> None:
        """For a training loop that takes gradients away as they are computed, as ZeRO's does; call it before the run.

        forward: called with a microbatch in place of the model. backward: called with its loss, in place of the loss's
            own; it scales the loss where the precision needs that.

        Such a loop leaves the first pass's gradients in `.grad`, whole, and averaged over ranks for "global".
        """
        self._forward, self._backward = forward, backward

    def match(self, event: Event, state: State) -> bool:
        """Whether to act at `event`: at a run's start, and in sharpness-aware steps."""
        at_start = event == Event.FIT_START
        return super().match(event, state) and (at_start or state.timestamp.batch.value % self.interval == 0)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Record the first pass's inputs; after its last microbatch, replace its gradients."""
        if event == Event.FIT_START:
            _check_run(state, self)
            act_last(self, state)  # to see batches as the others leave them, and to act on gradients before the others
        elif event == Event.BATCH_START:
            self._num_samples = count_samples(state.batch)
        elif event == Event.BEFORE_TRAIN_BATCH:  # again after a step that ran out of memory
            self._first_pass.clear()
            self._mean_num_samples = _mean_over_ranks(self._num_samples, state)
            _synchronize_gradients(state.model, self.perturbation == "global")
        elif event == Event.BEFORE_FORWARD:
            self._first_pass.append(_Microbatch(_shallow_copy(state.batch), state.batch, _random_state(state.model)))
        elif event == Event.BEFORE_LOSS:  # Composer's label smoothing and others change targets only for the loss
            self._first_pass[-1].loss_batch = _shallow_copy(state.batch)
        elif event == Event.AFTER_BACKWARD:
            if sum(microbatch.num_samples for microbatch in self._first_pass) == self._num_samples:
                self._replace_gradients(state)
        else:
            _synchronize_gradients(state.model, True)
            self._first_pass.clear()

    def _replace_gradients(self, state: State) -> None:
        if self.perturbation == "global":
            _refuse_unsynchronized(state.model)
        _synchronize_gradients(state.model, True)
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        sam_gradients(parameters, lambda: self._second_pass(state), rho=self.rho, adaptive=self.adaptive)

    def _second_pass(self, state: State) -> None:
        last = len(self._first_pass) - 1
        with frozen_statistics(state.model), _kept_random_state(state.model):
            for index, microbatch in enumerate(self._first_pass):
                _set_random_state(state.model, microbatch.random_state)
                with contextlib.nullcontext() if index == last else _no_sync(state.model):
                    loss = _loss(state, microbatch, forward=self._forward or state.model)
                    loss = loss * (microbatch.num_samples / self._mean_num_samples)
                    (self._backward or _scaled_backward(state))(loss)


@dataclass
class _Microbatch:
    """Inputs of the model and of the loss in the first pass: references, not copies of tensors."""

    forward_batch: Any
    loss_batch: Any
    random_state: _RandomState

    @property
    def num_samples(self) -> int:
        return count_samples(self.forward_batch)


@torch.no_grad()
def _perturb(parameters: Sequence[Tensor], *, rho: float, adaptive: bool) -> list[Tensor]:
    """Move `parameters` by e in place, overwriting their gradients; returns copies of this rank's shards of them."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    values, directions = _shards(parameters), _shards(gradients)
    originals = [value.clone() for value in values]
    if adaptive:
        _untyped._foreach_mul_(directions, originals)  # the norm of w g is that of |w| g
    step = rho / (_norm(gradients) + 1e-12)
    if adaptive:
        _untyped._foreach_mul_(directions, originals)
    if step.device.type == "cpu":
        _untyped._foreach_add_(values, directions, alpha=step.item())
        return originals
    # Elsewhere the step stays on its device: reading it would make the host wait.
    for device in {direction.device for direction in directions}:
        here = [direction for direction in directions if direction.device == device]
        _untyped._foreach_mul_(here, step.to(device))
    _untyped._foreach_add_(values, directions)
    return originals


def _shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    # Elementwise operations need only the shards, and functions on lists do not take all kinds of DTensors.
    return [local_part(tensor) for tensor in tensors]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all of `tensors`, in float32 at least."""
    norms = []
    for tensor in tensors:
        norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _scaled_backward(state: State) -> Callable[[Tensor], None]:
    if state.precision.value != "amp_fp16":
        return Tensor.backward
    scaler = state.scaler  # the Trainer unscales the gradients after this
    assert scaler is not None
    return lambda loss: scaler.scale(loss).backward()


def _loss(state: State, microbatch: _Microbatch, *, forward: Callable[[Any], Any]) -> Tensor:
    model: Any = state.model
    owner = model.module if isinstance(model, DistributedDataParallel) else model
    with precision_context(state):
        outputs = forward(microbatch.forward_batch)
    with precision_context(state):
        loss = owner.loss(outputs, microbatch.loss_batch)
    if isinstance(loss, Mapping):
        loss = loss["total"] if "total" in loss else tuple(loss.values())
    parts = loss if isinstance(loss, (tuple, list)) else (loss,)
    return torch.stack([part.mean() for part in parts]).sum()


def _shallow_copy(batch: Any) -> Any:
    # Algorithms replace a tensor in a list or a mapping, and restore it.
    return batch if isinstance(batch, Tensor) else copy.copy(batch)


def _mean_over_ranks(num_samples: int, state: State) -> float:
    # Composer weights microbatches this way, so that ranks with unequal last batches count by their samples.
    if world_size() == 1:
        return float(num_samples)
    total = state.device.tensor_to_device(torch.tensor(float(num_samples)))
    torch.distributed.all_reduce(total)
    return total.item() / world_size()


# --- ranks ---------------------------------------------------------------------------------------------------------


def _synchronize_gradients(model: nn.Module, synchronize: bool) -> None:
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = synchronize


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    # If parameters may be unused, the last microbatch may lack some that an earlier one had, so all synchronize.
    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        return model.no_sync()
    return contextlib.nullcontext()


def _refuse_unsynchronized(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync:
        raise ValueError(
            "sam.perturbation is global, and the Trainer averages gradients over ranks only after SAM has used them "
            "(ddp_sync_strategy forced_sync); leave ddp_sync_strategy out, or use perturbation: per_rank"
        )


def _check_run(state: State, algorithm: SAM) -> None:
    for other in state.algorithms:
        if getattr(other, "interpolate_loss", False):
            raise ValueError(
                f"{type(other).__name__} interpolates the loss, which SAM's second pass cannot repeat; set its "
                "interpolate_loss to False, which mixes the targets instead"
            )
    if state.fsdp_config_version == 1 and world_size() > 1:
        raise ValueError(
            "sam cannot tell the whole gradient's norm from the shards of FSDP version 1; "
            "use version 2 (torch's fully_shard) or DDP"
        )
    replicated = world_size() == 1 or isinstance(state.model, DistributedDataParallel)
    replicated = replicated or algorithm._forward is not None  # the loop's: see compute_second_pass_with
    if algorithm.perturbation == "per_rank" and not replicated:
        raise ValueError(
            "sam.perturbation is per_rank, which needs the whole of every parameter on every rank, and this run "
            "shards them; use perturbation: global, or DDP"
        )


def _check_rho(rho: float) -> None:
    if not 0 < rho < float("inf"):
        raise ValueError(f"sam.rho is {rho}; it must be above 0 and finite: 0.05 is usual, and leaving SAM out is none")


# --- random numbers ------------------------------------------------------------------------------------------------


@dataclass
class _RandomState:
    """What the model's next forward pass draws: torch's generators, and what was drawn for it in advance."""

    generators: list[Tensor]
    draws: list[tuple[MicrobatchDraws, Tensor | None]]


@contextlib.contextmanager
def _kept_random_state(model: nn.Module) -> Iterator[None]:
    before = _random_state(model)
    try:
        yield
    finally:
        _set_random_state(model, before)


def _random_state(model: nn.Module) -> _RandomState:
    generators = [torch.get_rng_state()]
    device = next(model.parameters()).device
    if device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        generators.append(torch.mps.get_rng_state())
    return _RandomState(generators, [(draws, draws.of_rows) for draws in microbatch_draws(model)])


def _set_random_state(model: nn.Module, state: _RandomState) -> None:
    torch.set_rng_state(state.generators[0])
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.generators[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state.generators[1])
    for draws, of_rows in state.draws:
        draws.of_rows = of_rows
