"""A linear model for Composer's Trainer, and a callback that interrupts its training."""

from __future__ import annotations

import torch
from composer.core import Callback
from composer.models import ComposerModel
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class TinyModel(ComposerModel):
    """Six inputs, three classes. measured: whether there is a top-1, in training and evaluation."""

    def __init__(self, *, measured: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(6, 3)
        self.measured = measured

    def forward(self, batch):
        return self.module(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train=False):
        top1 = {"top1": MulticlassAccuracy(num_classes=3, average="micro")} if self.measured else {}
        return top1 if is_train else {**top1, "loss": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        if isinstance(metric, MeanMetric):
            metric.update(F.cross_entropy(outputs, batch[1], reduction="none"))
        else:
            metric.update(outputs, batch[1])


class Interrupt(Callback):
    """Stands in for a kill: raises right after the given step."""

    def __init__(self, *, after_step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.after_step, self.error = after_step, error

    def batch_start(self, state, logger):
        if int(state.timestamp.batch) == self.after_step:
            raise self.error("stopped")
