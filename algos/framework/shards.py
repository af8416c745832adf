"""Parameters that FSDP2 shards: each rank holds a part of a DTensor."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether `tensor` is a DTensor."""
    return hasattr(tensor, "full_tensor")  # importing the class takes a second


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, which shares its memory; all of it if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor
