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

from .losses import Loss, check_class_weights, sample_losses

Batch = tuple[Tensor, Tensor]  # images [N, 3, S, S], targets [N] class indices or [N, K] probabilities


class ImageClassifier(ComposerModel):
    """Cross entropy or binary cross entropy over a network's logits; top-1 and loss as metrics.

    Targets may be class indices [N] or probabilities [N, K] (after MixUp or label smoothing). Accuracy against soft
    targets uses the most probable class, so under MixUp training accuracy is that of the heavier label.

    num_classes: K; algorithms read it to turn indices into probabilities.
    loss: "cross_entropy" is -sum_k t_k log softmax(z)_k per sample, "binary_cross_entropy" the sum over classes of
        -t_k log sigmoid(z_k) - (1 - t_k) log(1 - sigmoid(z_k)); both are means over samples.
    class_weights: a weight for each class in the training loss (see `models.losses.sample_losses`), at least 0; None
        weighs all alike. The evaluated loss has no weights, so that runs with and without them can be compared.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        loss: Loss = "cross_entropy",
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise ValueError(f"loss {loss!r} must be one of {', '.join(get_args(Loss))}")
        self.loss_name: Loss = loss
        self.module = module
        self.num_classes = num_classes
        self.class_names = tuple(class_names or ())
        self._class_weights = _checked(class_weights, num_classes)
        self._train_metrics: dict[str, Metric] = {"top1": _top1(num_classes)}
        self._eval_metrics: dict[str, Metric] = {"top1": _top1(num_classes), "loss": MeanMetric()}

    def forward(self, batch: Batch) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: Batch, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """The configured loss of logits [N, K]: its mean over samples, a scalar, or one value per sample, [N]."""
        if reduction == "mean" and self.loss_name == "cross_entropy" and self._class_weights is None:
            return F.cross_entropy(outputs, batch[1])
        losses = sample_losses(outputs, batch[1], loss=self.loss_name, class_weights=self._weights_on(outputs.device))
        return losses if reduction == "none" else losses.mean()

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return dict(self._train_metrics if is_train else self._eval_metrics)

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        targets = batch[1]
        if isinstance(metric, MeanMetric):
            metric.update(sample_losses(outputs.float(), targets, loss=self.loss_name))
            return
        metric.update(outputs, targets if targets.ndim == 1 else targets.argmax(dim=1))

    def _weights_on(self, device: torch.device) -> Tensor | None:
        # Kept there, since a copy in each step would have the host wait. No buffer: DeepSpeed and FSDP1 would round it
        # to 16 bits, and checkpoints would hold it.
        if self._class_weights is not None and self._class_weights.device != device:
            self._class_weights = self._class_weights.to(device)
        return self._class_weights


def _checked(class_weights: Sequence[float] | None, num_classes: int) -> Tensor | None:
    if class_weights is None:
        return None
    check_class_weights(class_weights)
    if len(class_weights) != num_classes:
        raise ValueError(f"received {len(class_weights)} class weights for {num_classes} classes; give one for each")
    return torch.tensor(class_weights, dtype=torch.float32)


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
