"""Figures about predictions, from logits [N, C] and labels [N]. torchmetrics counts; C is the number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Accuracy:
    """Shares of 1, and the mean loss of the recipe's kind.

    top5: None for five classes and fewer.
    balanced: the mean recall of the classes that have images: top-1 if each class had equally many.
    """

    top1: float
    top5: float | None
    loss: float
    balanced: float


def accuracy(logits: Tensor, labels: Tensor, *, loss: str = "cross_entropy") -> Accuracy:
    """Top-1, top-5, balanced accuracy and loss.

    loss: "cross_entropy", or "binary_cross_entropy" for its sum over classes, as in training.

    Raises ValueError for no images, or a label beyond the classes.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    classes = _check(logits, labels)

    def top(k: int) -> float:
        if classes == 1:
            return 1.0  # torchmetrics takes two classes and more
        return float(multiclass_accuracy(logits, labels, num_classes=classes, average="micro", top_k=k))

    return Accuracy(
        top1=top(1),
        top5=top(5) if classes > 5 else None,
        loss=_mean_loss(logits, labels, loss),
        balanced=_mean_recall(logits.argmax(dim=1), labels),
    )


def probabilities(logits: Tensor, *, loss: str = "cross_entropy") -> Tensor:
    """What the network believes of each class: softmax, or sigmoid after binary cross entropy."""
    return logits.float().sigmoid() if loss == "binary_cross_entropy" else logits.float().softmax(dim=1)


def confusion_matrix(predicted: Tensor, labels: Tensor, *, num_classes: int) -> np.ndarray:
    """Counts [C, C]: a row for each true class, a column for each predicted one."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    if num_classes == 1:
        return np.array([[len(labels)]])
    return multiclass_confusion_matrix(predicted, labels, num_classes=num_classes).numpy()


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean over images of |accuracy - confidence| of their bin.

    Confidence is the largest probability; the bins are 15 equal parts of [0, 1].
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = _check(probabilities, labels)
    if classes == 1:
        return 0.0
    found = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=CALIBRATION_BINS, norm="l1")
    return float(found)


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """The bins of `calibration_error` that hold images: their number, mean confidence and accuracy."""
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    bins = torch.bucketize(confidence, torch.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    return [
        {
            "images": int((bins == index).sum()),
            "confidence": float(confidence[bins == index].double().mean()),
            "accuracy": float(right[bins == index].mean()),
        }
        for index in bins.unique().tolist()
    ]


def class_figures(confusion: np.ndarray) -> list[dict[str, Any]]:
    """For each class: images, precision, recall, F1 (None where nothing is counted), and what it is taken for most."""
    found = []
    for index, row in enumerate(confusion):
        right, images, predicted = int(row[index]), int(row.sum()), int(confusion[:, index].sum())
        wrong = row.copy()
        wrong[index] = 0
        found.append(
            {
                "images": images,
                "precision": right / predicted if predicted else None,
                "recall": right / images if images else None,
                "f1": 2 * right / (images + predicted) if images + predicted else None,
                "mistaken_for": int(wrong.argmax()) if wrong.any() else None,
            }
        )
    return found


def consistency(predictions: Tensor) -> float:
    """The mean share of pairs of shifts under which an image is given the same class (Zhang 2019, with all pairs).

    predictions: class indices [N, shifts], two shifts or more.
    """
    shifts = predictions.shape[1]
    if shifts < 2:
        raise ValueError(f"{shifts} shift was given; it takes two or more to agree or not")
    same = (predictions[:, :, None] == predictions[:, None, :]).double().sum(dim=(1, 2)) - shifts
    return float((same / (shifts * (shifts - 1))).mean())


def _mean_recall(predicted: Tensor, labels: Tensor) -> float:
    images = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(images))
    return float((right[images > 0].double() / images[images > 0]).mean())


def _mean_loss(logits: Tensor, labels: Tensor, loss: str) -> float:
    logits = logits.double()
    if loss == "cross_entropy":
        return float(F.cross_entropy(logits, labels))
    targets = F.one_hot(labels, logits.shape[1]).double()
    return float(F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(labels))


def _check(scores: Tensor, labels: Tensor) -> int:
    """The number of classes."""
    if not len(labels):
        raise ValueError("there are no images to judge; give a split that has some")
    classes = scores.shape[1]
    if int(labels.max()) >= classes:
        raise ValueError(
            f"an image has label {int(labels.max())}, and the network has {classes} classes; give data of its classes"
        )
    return classes
