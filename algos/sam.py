"""Sharpness-aware minimization: the gradient is taken at the worst point near the weights.

Foret 2021 (arXiv 2010.01412); the scale-invariant form is Kwon 2021 (arXiv 2102.11600).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from algos.base import Contract, Event, Logger, Resource, SpeedUp, State, precision_context, world_size

Perturbation = Literal["global", "per_rank"]


def sam_gradients(
    parameters: Iterable[Tensor], second_pass: Callable[[], Any], *, rho: float = 0.05, adaptive: bool = False
) -> None:
    """Replace the gradients of `parameters` by those at w + e, leaving w as it was, bit for bit.

        e = rho g / ||g||_2                       adaptive: e = rho w^2 g / || |w| g ||_2

    with g the gradients that `parameters` hold now and the norm taken over all of them. Call it between `backward()`
    and the optimizer's step. `second_pass` runs the same batch forward and backward again and must leave its gradients
    in `.grad`; random layers must draw as they did before, and `frozen_statistics` keeps batch norm from counting the
    batch twice (the class does both).

    Holds one extra copy of the parameters while `second_pass` runs. Parameters without a gradient stay where they are.
    """
    perturbed = [parameter for parameter in parameters if parameter.grad is not None]
    originals = _perturb(perturbed, rho=rho, adaptive=adaptive)
    try:
        for parameter in perturbed:
            parameter.grad = None
        second_pass()
    finally:
        with torch.no_grad():
            torch._foreach_copy_(perturbed, originals)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within, batch norms in training mode normalize with the batch's statistics and leave their running ones alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class SAM(SpeedUp):
    """Makes every `interval`-th step a sharpness-aware one, at the price of a second forward and backward pass.

    rho: radius of the neighborhood, in the parameters' own norm (0.05 in the paper; Composer's recipes use 0.5 at
    interval 10). adaptive: ASAM, whose neighborhood scales with each weight (rho about ten times larger).
    interval: steps between sharpness-aware ones; 1 makes every step one.
    perturbation: "global" takes e from the gradient averaged over ranks, so a run means the same on any number of them;
    "per_rank" takes each rank's own, which saves the first pass its all-reduce and is the paper's m-sharpness.

    The optimizer is left as it is: checkpoints hold it under its own name. Metrics and the logged loss are those of the
    first pass. Both passes see the same microbatches, the same MixUp draw and the same dropout masks.
    """

    contract = Contract(owns=[Resource.GRADIENTS])
    events = (Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.AFTER_TRAIN_BATCH)

    def __init__(
        self,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        perturbation: Perturbation = "global",
    ) -> None:
        if rho <= 0:
            raise ValueError(f"sam.rho is {rho}; it must be more than 0 (null turns SAM off)")
        if interval < 1:
            raise ValueError(f"sam.interval is {interval} steps; it must be at least 1")
        if perturbation not in ("global", "per_rank"):
            raise ValueError(f"sam.perturbation is {perturbation!r}; it is global or per_rank")
        self.rho = rho
        self.adaptive = adaptive
        self.interval = interval
        self.perturbation: Perturbation = perturbation
        self._microbatches: list[Any] = []
        self._random_state: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) and state.timestamp.batch.value % self.interval == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_TRAIN_BATCH:
            self._microbatches.clear()
            self._random_state = _random_state(state)
            self._synchronize_first_pass(state, self.perturbation == "global")
        elif event == Event.BEFORE_FORWARD:
            self._microbatches.append(state.batch)  # references: exactly what the first pass sees, and no copy
        else:
            self._synchronize_first_pass(state, True)
            parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
            sam_gradients(parameters, lambda: self._second_pass(state), rho=self.rho, adaptive=self.adaptive)
            self._microbatches.clear()

    def _second_pass(self, state: State) -> None:
        after_first_pass = _random_state(state)
        _set_random_state(state, self._random_state)
        sizes = [_num_samples(microbatch) for microbatch in self._microbatches]
        mean_batch_size = _mean_over_ranks(sum(sizes), state)
        scale = state.scaler.get_scale() if _scales_gradients(state) else 1.0
        last = len(sizes) - 1
        with frozen_statistics(state.model):
            for index, microbatch in enumerate(self._microbatches):
                with _no_sync(state.model) if index < last else contextlib.nullcontext():
                    loss = _loss(state, microbatch)
                    (loss * (scale * sizes[index] / mean_batch_size)).backward()
        if scale != 1.0:
            _unscale(state, scale)
        _set_random_state(state, after_first_pass)

    def _synchronize_first_pass(self, state: State, synchronize: bool) -> None:
        if isinstance(state.model, DistributedDataParallel):
            state.model.require_backward_grad_sync = synchronize


@torch.no_grad()
def _perturb(parameters: Sequence[Tensor], *, rho: float, adaptive: bool) -> list[Tensor]:
    """Move `parameters` by e in place; returns copies of what they were."""
    originals = [parameter.detach().clone() for parameter in parameters]
    if not parameters:
        return originals
    directions = [parameter.grad for parameter in parameters]
    if adaptive:
        directions = torch._foreach_mul(torch._foreach_abs(originals), directions)
    norms = [torch.linalg.vector_norm(direction, dtype=_at_least_float32(direction)) for direction in directions]
    norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    step = rho / (norm + 1e-12)  # stays on the device: reading it would make the host wait
    for parameter, original, direction in zip(parameters, originals, directions, strict=True):
        direction = direction * original.abs() if adaptive else direction
        parameter.add_((direction * step.to(direction.device)).to(parameter.dtype))
    return originals


def _loss(state: State, microbatch: Any) -> Tensor:
    model: Any = state.model
    owner = model.module if isinstance(model, DistributedDataParallel) else model
    with precision_context(state):
        outputs = model(microbatch)
    with precision_context(state):
        loss = owner.loss(outputs, microbatch)
    if isinstance(loss, dict):
        loss = loss["total"] if "total" in loss else tuple(loss.values())
    parts = loss if isinstance(loss, (tuple, list)) else (loss,)
    return torch.stack([part.mean() for part in parts]).sum()


def _num_samples(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.shape[0]
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return _num_samples(first)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _mean_over_ranks(batch_size: int, state: State) -> float:
    # Composer weighs microbatches this way, so that ranks with unequal last batches count by their samples.
    if world_size() == 1:
        return float(batch_size)
    total = state.device.tensor_to_device(torch.tensor(float(batch_size)))
    torch.distributed.all_reduce(total)
    return total.item() / world_size()


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def _scales_gradients(state: State) -> bool:
    return state.scaler is not None and state.scaler.is_enabled() and state.precision.value == "amp_fp16"


def _unscale(state: State, scale: float) -> None:
    """Divide the gradients by the loss scale, and tell the scaler when the second pass overflowed.

    The Trainer unscaled the first pass's gradients already, and a GradScaler refuses to do it twice in a step; it would
    miss an overflow of the second pass and let the optimizer step on it.
    """
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / scale)
    finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()
    for optimizer in state.optimizers:
        found = state.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for device, flag in found.items():
            flag.copy_(torch.maximum(flag, (~finite).to(device=device, dtype=flag.dtype)))


def _random_state(state: State) -> list[Tensor]:
    states = [torch.get_rng_state()]
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def _set_random_state(state: State, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])
