"""What the algorithms that act on a batch share: splitting it, and turning class indices into probabilities.

Shapes: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """The (images, targets) of a batch; ValueError for any other form."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    form = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else type(batch).__name__
    raise ValueError(
        f"received a batch that is a {form}; it must be a pair of tensors (images, targets): "
        "have the loader or its collate function return that pair"
    )


def count_samples(batch: Any) -> int:
    """Rows of the first tensor in `batch`, a tensor or a sequence or mapping of such."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    return count_samples(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


def count_classes(model: nn.Module, *, num_classes: int | None = None) -> int | None:
    """`num_classes` if given, else the model's own `num_classes`, looked up through wrappers such as DDP; else None."""
    module: Any = model
    while num_classes is None and isinstance(module, nn.Module):
        num_classes = getattr(module, "num_classes", None)
        module = getattr(module, "module", None)
    return num_classes


def check_num_classes(num_classes: int | None) -> None:
    """ValueError unless `num_classes` is None or positive."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes {num_classes} must be at least 1; leave it out to read the model's own")


def soften(targets: Tensor, *, num_classes: int | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Probabilities [N, K] from class indices [N] (one-hot rows), or the probabilities [N, K] that were given.

    Indices become torch.get_default_dtype(), floating-point probabilities keep their dtype. A row whose index is
    `ignore_index` is all zero. num_classes: K; needed for indices, checked against probabilities.

    Raises ValueError for another shape, a missing or contradicted K, and (on CPU, where checking costs nothing) an
    index outside [0, K); on an accelerator PyTorch's device-side assertion reports the last.
    """
    if targets.ndim == 2:
        if num_classes is not None and targets.shape[1] != num_classes:
            raise ValueError(
                f"received probabilities over {targets.shape[1]} classes and num_classes {num_classes}; "
                "they must be equal: leave num_classes out"
            )
        return targets if targets.is_floating_point() else targets.to(torch.get_default_dtype())
    if targets.ndim != 1 or targets.is_floating_point():
        raise ValueError(
            f"received targets of shape {list(targets.shape)} and type {targets.dtype}; they must be class indices [N] "
            "of an integer type or probabilities [N, K]: squeeze or convert them"
        )
    if num_classes is None:
        raise ValueError("received class indices without num_classes; they need it to become rows: pass num_classes")
    return _one_hot(targets.long(), num_classes, ignore_index)


def _one_hot(indices: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    kept = indices != ignore_index
    if indices.device.type == "cpu" and bool((kept & ((indices < 0) | (indices >= num_classes))).any()):
        wrong = indices[kept & ((indices < 0) | (indices >= num_classes))]
        raise ValueError(
            f"received class index {int(wrong[0])}; indices must lie in 0..{num_classes - 1} or be the ignore_index "
            f"{ignore_index}: correct the labels or num_classes"
        )
    rows = torch.zeros(indices.shape[0], num_classes, dtype=torch.get_default_dtype(), device=indices.device)
    safe = torch.where(kept, indices, 0).unsqueeze(1)
    return rows.scatter_(1, safe, kept.to(rows.dtype).unsqueeze(1))
