"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon): momentum whose update is made nearly orthogonal.

For hidden matrices; all other weights are updated by this project's AdamW or SGD, in the same optimizer object. torch's
own, where it has one, takes 2-D weights alone, one after the other, and orthogonalizes in bfloat16 everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from algos.framework.shards import is_sharded, local_part

Scale = Literal["original", "match_rms_adamw"]
Dtype = Literal["auto", "bfloat16", "float32"]
SCALES, DTYPES = get_args(Scale), get_args(Dtype)
_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST_NORM = 1e-7


def orthogonalize(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Each of `matrices` [..., m, n] with its singular values moved near to 1, in their own type.

    X <- G / |G|, then `steps` times X <- a X + (b X X' + c (X X')²) X with a, b, c = 3.4445, -4.7750, 2.0315, an odd
    polynomial that takes singular values in (0, 1] to about 0.7 to 1.2 (Newton-Schulz). A tall matrix is transposed
    meanwhile.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def update_scale(rows: int, columns: int, scale: Scale) -> float:
    """Factor on a matrix's orthogonal update.

    original: sqrt(max(1, rows / columns)); match_rms_adamw: 0.2 sqrt(max(rows, columns)), with which the update has
    the size of AdamW's and takes AdamW's learning rate (Liu 2025, arXiv 2502.16982).
    """
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and `others`, an optimizer over all other weights, in one.

    For a weight W [out, ...], seen as the matrix [out, all the rest], and its gradient G:

        M <- momentum M + (1 - momentum) G
        U <- (1 - momentum) G + momentum M with nesterov, else M
        W <- (1 - lr weight_decay) W - lr s orthogonalize(U),  s by `update_scale`

    Matrices of one shape are orthogonalized together. A weight that FSDP2 shards is updated as a whole: every rank
    gathers its U and orthogonalizes it, and keeps its part; M stays sharded.

    matrices: of at least two dimensions.
    momentum: in [0, 1). newton_schulz_steps: 1 or more.
    newton_schulz_dtype: in which to orthogonalize; auto: bfloat16 on GPUs, float32 elsewhere.
    others: optimizers/fused.py's; its groups become this optimizer's, with learning rates of their own.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr_fn: Scale = "original",
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: Dtype = "auto",
        others: torch.optim.Optimizer | None = None,
    ) -> None:
        own = {
            "params": list(matrices),
            "kind": "muon",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
        }
        flat = next((weight for weight in own["params"] if weight.ndim < 2), None)
        if flat is not None:
            raise ValueError(f"a weight of shape {list(flat.shape)} is no matrix; give it to `others`")
        self._others = others
        rest = [{**group, "kind": "others"} for group in others.param_groups] if others is not None else []
        super().__init__([own, *rest], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient. closure: computes gradients and the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._update_matrices(group)
        if self._others is not None:
            # Loading a checkpoint and sharding make new groups and a new state.
            self._others.param_groups = [group for group in self.param_groups if group["kind"] == "others"]
            self._others.state = self.state
            self._others.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[Any, list[_Update]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                matrix = self._momentum_update(weight, group).flatten(1)
                dtype = _dtype(group["newton_schulz_dtype"], matrix.device)
                by_shape[matrix.device, dtype, matrix.shape].append(_Update(weight, matrix.to(dtype)))
        for updates in by_shape.values():
            _apply(updates, group)

    def _momentum_update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """U of the class's formula, whole on every rank."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        gradient, momentum = local_part(weight.grad), local_part(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return _gathered(gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum, like=weight)


class _Update(NamedTuple):
    weight: Tensor
    matrix: Tensor


def _apply(updates: Sequence[_Update], group: dict[str, Any]) -> None:
    """Orthogonalize matrices of one shape together and take their steps."""
    lr, steps = float(group["lr"]), group["newton_schulz_steps"]
    rows, columns = updates[0].matrix.shape
    scale = update_scale(rows, columns, group["adjust_lr_fn"])
    if len(updates) == 1:
        orthogonal: Any = [orthogonalize(updates[0].matrix, steps=steps)]
    else:
        orthogonal = orthogonalize(torch.stack([one.matrix for one in updates]), steps=steps)
    for (weight, _), direction in zip(updates, orthogonal, strict=True):
        part = local_part(weight)
        part.mul_(1 - lr * group["weight_decay"])
        part.add_(_own_part(direction.reshape(weight.shape), like=weight), alpha=-lr * scale)


def _dtype(name: Dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def _gathered(part: Tensor, *, like: Any) -> Tensor:
    """The whole tensor of which `part` is this rank's part, sharded as `like` is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return whole.full_tensor()


def _own_part(whole: Tensor, *, like: Any) -> Tensor:
    """This rank's part of `whole`, which every rank has, sharded as `like` is."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    return (
        DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )
