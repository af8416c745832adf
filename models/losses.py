"""Losses of classifiers, one value per sample, with or without a weight for each class.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["cross_entropy", "binary_cross_entropy"]


def sample_losses(
    outputs: Tensor, targets: Tensor, *, loss: Loss = "cross_entropy", class_weights: Tensor | None = None
) -> Tensor:
    """The loss of each sample, [N]; their sum over N is a batch's loss.

        cross_entropy:         l_i = -sum_k w_k t_ik log softmax(z_i)_k
        binary_cross_entropy:  l_i = -sum_k w_k t_ik · sum_k (t_ik log s_ik + (1 - t_ik) log(1 - s_ik)), s = sigmoid(z)

    With class indices as targets both are the weight of the sample's class times its unweighted loss. A mixture weighs
    by its parts, and under binary cross entropy, which has no sum of targets to share the weight out, as a whole.

    The weighted mean of a batch is sum_i l_i / N, not torch's sum_i l_i / sum_i w_i: that divides by what the batch
    happens to hold, so that microbatches and ranks, averaged, would give another gradient than the whole batch.

    outputs: logits z, [N, K].
    targets: class indices [N], or t, probabilities [N, K] (after MixUp or label smoothing).
    class_weights: w, [K], on the device of `outputs`; None weighs all classes 1. Logits of 16 bits are converted to
        float32 for it.
    """
    if class_weights is None:
        return _unweighted(outputs, targets, loss)
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    class_weights = class_weights.to(outputs.dtype)
    if loss == "cross_entropy":
        targets = targets if targets.ndim == 1 else targets.to(outputs.dtype)
        return F.cross_entropy(outputs, targets, weight=class_weights, reduction="none")
    of_samples = class_weights[targets] if targets.ndim == 1 else targets.to(outputs.dtype) @ class_weights
    return of_samples * _unweighted(outputs, targets, loss)


def inverse_frequency_weights(counts: Sequence[int]) -> list[float]:
    """w_k = N / (C n_k): inverse to the class's share of the images, with a mean over images of 1.

        sum_k n_k w_k / N = 1, so the learning rate and the loss keep their scale

    counts: n_k, the images of each class, 0 or more; N of them in all, in C classes that have any. A class without
        images gets 0, so that the share of label smoothing that goes to it counts for nothing.

    Raises ValueError if there are no images.
    """
    if not any(count > 0 for count in counts):
        raise ValueError("received no class with images; give the number of training images of each class")
    scale = sum(counts) / sum(count > 0 for count in counts)
    return [scale / count if count else 0.0 for count in counts]


def check_class_weights(class_weights: Sequence[float]) -> None:
    """Raise ValueError unless these are finite numbers of at least 0, one of them above 0."""
    if not class_weights or not all(math.isfinite(one) and one >= 0 for one in class_weights) or not any(class_weights):
        raise ValueError(
            f"class weights {', '.join(map(str, class_weights)) or '(none)'}: give a finite number of at least 0 for "
            "each class, one of them above 0"
        )


def _unweighted(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction="none")
    if targets.ndim == 1:
        targets = F.one_hot(targets, outputs.shape[1])
    losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return losses.sum(dim=1)
