"""The wrapper that lets Composer's Trainer train an image classifier on index or soft targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]  # images [N, 3, S, S], targets [N] class indices or [N, K] probabilities


class ImageClassifier(ComposerModel):
    """Cross entropy over a network's logits; top-1 and loss as metrics.

    Targets may be class indices [N] or probabilities [N, K] (after MixUp or label smoothing). Accuracy against soft
    targets counts the heavier class, so training accuracy under MixUp is that of the heavier label.

    num_classes: K, what algorithms read to turn indices into probabilities.
    """

    def __init__(self, module: nn.Module, *, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.module = module
        self.num_classes = num_classes
        self.class_names = tuple(class_names or ())
        self._train_metrics: dict[str, Metric] = {"top1": _top1(num_classes)}
        self._eval_metrics: dict[str, Metric] = {"top1": _top1(num_classes), "loss": MeanMetric()}

    def forward(self, batch: Batch) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean over samples of -sum_k target_k log softmax(outputs)_k."""
        return F.cross_entropy(outputs, batch[1])

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return dict(self._train_metrics if is_train else self._eval_metrics)

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        targets = batch[1]
        if isinstance(metric, MeanMetric):
            losses = F.cross_entropy(outputs.float(), targets, reduction="none")
            metric.update(losses)
            return
        metric.update(outputs, targets if targets.ndim == 1 else targets.argmax(dim=1))


def count_parameters(module: nn.Module) -> int:
    """Number of scalars in the parameters of `module`, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def count_forward_macs(module: nn.Module, *, image_size: int) -> int:
    """Multiply-adds of one image's forward pass at `image_size` px: those of convolutions and matrix products.

    Counted by running the network on meta tensors, so it costs no memory and leaves the network as it is.
    """
    from copy import deepcopy

    from torch.utils.flop_counter import FlopCounterMode

    shadow = deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2


def _top1(num_classes: int) -> Metric:
    return MulticlassAccuracy(num_classes=num_classes, average="micro")
