"""SGD and AdamW that update all weights of a kind with one kernel, with torch's own results, settings and state.

torch's `fused=True` is not used as it is, since

- a checkpoint's groups replace the optimizer's, so a run resumed from one without it would go on without it; here the
  kernel is chosen at each step, from where the weights are, and stands in no checkpoint;
- its kernel on CPUs assumes that weight, gradient and state lie alike in memory and is silently wrong where they do
  not, as after `channels_last` converts a model whose momentum comes from another run (seen with torch 2.6, 2.7, 2.15);
- its SGD leaves the momentum uninitialized if the first step's gradients overflow under a gradient scaler (2.15);
- no torch up to 2.15 has its SGD for sharded weights. It treats each element alone, so here each rank updates its own
  shards as plain tensors, which also saves DTensor's work on each of them.

Where there is no such kernel, torch's other implementations run. On CPUs their foreach variant is no alternative: each
of its operations reads and writes all weights, which then leave the cache (2.5 times the time of a loop, ResNet-50).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

kernels: Any = torch  # whose operations on lists of tensors have names with an underscore
Group = dict[str, Any]
HasKernel = Callable[[str, torch.dtype], bool]
_SHARDED_BY_FSDP1 = ("_fsdp_flattened", "_is_flat_param")


class Updated(NamedTuple):
    """Weights of one device and type, with what belongs to each: plain tensors that lie alike in memory."""

    weights: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]  # one list per key
    steps: list[Tensor]  # counts, on the weights' device; empty for optimizers that do not count


class Fused:
    """First base of an optimizer whose class `otherwise` says how it steps where there is no kernel."""

    otherwise: type[torch.optim.Optimizer]
    has_kernel: HasKernel

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient. closure: computes gradients and the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, self._fuse(group)) for group in self.param_groups]
        if any(kinds is None for _, kinds in groups):
            inspect.unwrap(self.otherwise.step)(self)  # without its profiling and hooks, which this step has had
            return loss
        for group, kinds in groups:
            for kind in kinds:
                self._update(group, kind)
        return loss

    @property
    def _step_supports_amp_scaling(self: Any) -> bool:
        """Whether a gradient scaler may leave division and skipping to the step, which then waits for no device.

        Not for shards: torch's scaler for them tells ranks of each other's overflows only where it divides itself.
        """
        return all(
            self.has_kernel(weight.device.type, weight.dtype) and not is_sharded(weight) and _is_plain(group)
            for group in self.param_groups
            for weight in group["params"]
        )

    def _fuse(self, group: Group) -> list[Updated] | None:
        """The group's weights as `_update` takes them; None if its kernel cannot take them."""
        raise NotImplementedError

    def _update(self, group: Group, kind: Updated) -> None:
        raise NotImplementedError


class FusedSGD(Fused):
    """By torch's SGD kernel."""

    has_kernel = staticmethod(lambda device_type, dtype: sgd_has_kernel(device_type, dtype))

    def _fuse(self, group: Group) -> list[Updated] | None:
        keys = ["momentum_buffer"] if group["momentum"] else []
        return _gather(self, group, keys, counts=False)

    def _update(self, group: Group, kind: Updated) -> None:
        update_by_sgd(self, group, kind, weight_decay=group["weight_decay"])


class FusedAdamW(Fused):
    """By torch's AdamW kernel."""

    has_kernel = staticmethod(lambda device_type, dtype: adamw_has_kernel(device_type, dtype))

    def _fuse(self, group: Group) -> list[Updated] | None:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        return _gather(self, group, keys, counts=True)

    def _update(self, group: Group, kind: Updated) -> None:
        update_by_adamw(self, group, kind, weight_decay=group["weight_decay"])


class SGD(FusedSGD, torch.optim.SGD):
    """torch.optim.SGD; a checkpoint of either continues the other."""

    otherwise = torch.optim.SGD


class AdamW(FusedAdamW, torch.optim.AdamW):
    """torch.optim.AdamW; a checkpoint of either continues the other."""

    otherwise = torch.optim.AdamW


def update_by_sgd(optimizer: Any, group: Group, kind: Updated, *, weight_decay: float) -> None:
    """Step with torch's kernel. weight_decay: times the weight, added to the gradient."""
    kernels._fused_sgd_(
        kind.weights,
        kind.gradients,
        kind.states[0] if kind.states else [],
        weight_decay=weight_decay,
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,  # a momentum of 0 becomes the gradient
        **scaling(optimizer, kind),
    )


def update_by_adamw(optimizer: Any, group: Group, kind: Updated, *, weight_decay: float) -> None:
    """Step with torch's kernel. weight_decay: times the learning rate is the share by which weights shrink."""
    scaled = scaling(optimizer, kind)
    beta1, beta2 = group["betas"]
    kernels._foreach_add_(kind.steps, 1)
    kernels._fused_adamw_(
        kind.weights,
        kind.gradients,
        kind.states[0],
        kind.states[1],
        kind.states[2] if group["amsgrad"] else [],
        kind.steps,
        amsgrad=group["amsgrad"],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=group["maximize"],
        **scaled,
    )
    if "found_inf" in scaled:  # 1 if the step was skipped
        kernels._foreach_sub_(kind.steps, [scaled["found_inf"]] * len(kind.steps))


def scaling(optimizer: Any, kind: Updated) -> dict[str, Tensor]:
    """What a gradient scaler has left at the optimizer for this step, on the weights' device."""
    given = {key: getattr(optimizer, key, None) for key in ("grad_scale", "found_inf")}
    device = kind.weights[0].device
    return {key: value.to(device, non_blocking=True) for key, value in given.items() if value is not None}


def is_sharded(weight: Tensor) -> bool:
    """Whether FSDP, of either kind, has made shards of `weight`."""
    return hasattr(weight, "to_local") or any(hasattr(weight, name) for name in _SHARDED_BY_FSDP1)


@torch.compiler.assume_constant_result  # the trial is not part of a compiled step
def sgd_has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's SGD kernel runs there, found by trying it."""
    return _try_sgd(device_type, dtype)


@torch.compiler.assume_constant_result
def adamw_has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's AdamW kernel runs there, found by trying it."""
    return _try_adamw(device_type, dtype)


@functools.cache
def _try_sgd(device_type: str, dtype: torch.dtype) -> bool:
    weight, gradient = (torch.zeros(1, dtype=dtype, device=device_type) for _ in range(2))
    settings: Any = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.0, "dampening": 0.0}
    flags: Any = {"nesterov": False, "maximize": False, "is_first_step": False}
    return _runs(lambda: kernels._fused_sgd_([weight], [gradient], [], **settings, **flags))


@functools.cache
def _try_adamw(device_type: str, dtype: torch.dtype) -> bool:
    weight, gradient, first, second = ([torch.zeros(1, dtype=dtype, device=device_type)] for _ in range(4))
    steps = [torch.ones((), device=device_type)]
    settings: Any = {"lr": 0.0, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.0, "eps": 1e-8}
    flags: Any = {"amsgrad": False, "maximize": False}
    return _runs(lambda: kernels._fused_adamw_(weight, gradient, first, second, [], steps, **settings, **flags))


def _gather(optimizer: Any, group: Group, keys: Sequence[str], *, counts: bool) -> list[Updated] | None:
    """The group's weights that have gradients, by device and type, with their gradients and states.

    keys: of states that are shaped like the weight, and zero at first. counts: whether there is a state "step" too.
    """
    if not _is_plain(group):
        return None
    kinds: dict[tuple[torch.device, torch.dtype], Updated] = {}
    for weight in group["params"]:
        if weight.grad is None:
            continue
        local = _local(weight)
        gradient = _aligned(_local(weight.grad), local)
        kind = local.device, local.dtype
        if gradient is None or (kind not in kinds and not optimizer.has_kernel(local.device.type, local.dtype)):
            return None
        if kind not in kinds:
            kinds[kind] = Updated([], [], [[] for _ in keys], [])
        updated, state = kinds[kind], optimizer.state[weight]
        updated.weights.append(local)
        updated.gradients.append(gradient)
        for key, tensors in zip(keys, updated.states, strict=True):
            tensors.append(_aligned_state(state, key, weight, local))
        if counts:
            updated.steps.append(_count(state, local.device))
    return list(kinds.values())


def _is_plain(group: Group) -> bool:
    # With dampening, SGD's first step differs from the others.
    return not (group.get("dampening") or group.get("differentiable"))


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, which shares its memory; any other tensor itself."""
    if type(tensor) in (Tensor, nn.Parameter):  # which saves a look-up that fails
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _aligned(gradient: Tensor, weight: Tensor) -> Tensor | None:
    """`gradient`, or a copy, at the strides of `weight`; None if no new tensor has them, since `weight` has gaps."""
    if gradient.is_sparse or gradient.dtype != weight.dtype:
        return None
    if gradient.stride() == weight.stride():
        return gradient
    copy = torch.empty_like(weight).copy_(gradient)
    return copy if copy.stride() == weight.stride() else None


def _aligned_state(state: dict[str, Any], key: str, weight: Tensor, local: Tensor) -> Tensor:
    kept = state.get(key)
    if kept is None:
        kept = state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    part = _local(kept)
    if part.stride() != local.stride():
        state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        part = _local(state[key]).copy_(part)
    return part


def _count(state: dict[str, Any], device: torch.device) -> Tensor:
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    elif state["step"].device != device:  # torch's other implementations keep it on the CPU
        state["step"] = state["step"].to(device)
    return state["step"]


def _runs(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except (RuntimeError, AttributeError, TypeError):
        return False
    return True
