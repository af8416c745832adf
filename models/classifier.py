"""The wrapper that lets Composer's Trainer train an image classifier on index or soft targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

Loss = Literal["cross_entropy", "binary_cross_entropy"]
Batch = tuple[Tensor, Tensor]  # images [N, 3, S, S], targets [N] class indices or [N, K] probabilities


class ImageClassifier(ComposerModel):
    """Cross entropy or binary cross entropy over a network's logits; top-1 and loss as metrics.

    Targets may be class indices [N] or probabilities [N, K] (after MixUp or label smoothing). Accuracy against soft
    targets uses the most probable class, so under MixUp training accuracy is that of the heavier label.

    num_classes: K; algorithms read it to turn indices into probabilities.
    loss: "cross_entropy" is -sum_k t_k log softmax(z)_k per sample, "binary_cross_entropy" the sum over classes of
        -t_k log sigmoid(z_k) - (1 - t_k) log(1 - sigmoid(z_k)); both are means over samples.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise ValueError(f"loss {loss!r} must be one of {', '.join(get_args(Loss))}")
        self.loss_name = loss
        self.module = module
        self.num_classes = num_classes
        self.class_names = tuple(class_names or ())
        self._train_metrics: dict[str, Metric] = {"top1": _top1(num_classes)}
        self._eval_metrics: dict[str, Metric] = {"top1": _top1(num_classes), "loss": MeanMetric()}

    def forward(self, batch: Batch) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: Batch, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """The configured loss of logits [N, K]: its mean over samples, a scalar, or one value per sample, [N]."""
        if reduction == "none":
            return self._losses(outputs, batch[1])
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(outputs, batch[1])
        return _binary_cross_entropy(outputs, batch[1]).mean()

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return dict(self._train_metrics if is_train else self._eval_metrics)

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        targets = batch[1]
        if isinstance(metric, MeanMetric):
            metric.update(self._losses(outputs.float(), targets))
            return
        metric.update(outputs, targets if targets.ndim == 1 else targets.argmax(dim=1))

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One per sample, [N]: batches may differ in size, and an epoch's mean is over its samples."""
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(outputs, targets, reduction="none")
        return _binary_cross_entropy(outputs, targets)


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over classes for each sample: logits [N, K], targets [N] or [N, K] -> [N]."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, outputs.shape[1])
    losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return losses.sum(dim=1)


def _top1(num_classes: int) -> Metric:
    return _Top1(num_classes=num_classes, average="micro", validate_args=False)


class _Top1(MulticlassAccuracy):
    """torchmetrics' accuracy, whose counts the ranks add up at once and without waiting for a device.

    torchmetrics gathers each of its four counts after a barrier, and Composer asks for the metric in every step.
    """

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        counts = torch.stack([getattr(self, name) for name in self._reductions])
        torch.distributed.all_reduce(counts, group=process_group or self.process_group)
        for name, count in zip(self._reductions, counts.unbind(), strict=True):
            setattr(self, name, count)
