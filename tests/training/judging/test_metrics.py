"""Counts against scikit-learn's, and calibration and consistency against their formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn

from training.judging.metrics import (
    accuracy,
    calibration_error,
    class_figures,
    confusion_matrix,
    consistency,
    probabilities,
    reliability,
)  # fmt: skip

IMAGES = 400


@pytest.fixture(params=[2, 10, 60])
def said(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a network that is right about half of the time; one class has no images."""
    generator = torch.Generator().manual_seed(request.param)
    labels = torch.randint(request.param - 1, (IMAGES,), generator=generator)
    logits = torch.randn(IMAGES, request.param, generator=generator)
    logits[torch.arange(IMAGES), labels] += 1.5
    return logits, labels


def test_counts_are_scikit_learns(said: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = said
    classes = logits.shape[1]
    found, predicted = accuracy(logits, labels), logits.argmax(dim=1)
    assert found.top1 == pytest.approx(sklearn.accuracy_score(labels, predicted), abs=1e-6)
    of_present = {"labels": np.unique(labels), "average": "macro"}
    assert found.balanced == pytest.approx(sklearn.recall_score(labels, predicted, **of_present))
    assert found.loss == pytest.approx(sklearn.log_loss(labels, logits.double().softmax(1), labels=range(classes)))
    if classes > 5:
        assert found.top5 == pytest.approx(
            sklearn.top_k_accuracy_score(labels, logits, k=5, labels=range(classes)), abs=1e-6
        )
    else:
        assert found.top5 is None
    confusion = confusion_matrix(predicted, labels, num_classes=classes)
    np.testing.assert_array_equal(confusion, sklearn.confusion_matrix(labels, predicted, labels=range(classes)))
    expected = sklearn.precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=np.nan)
    for index, one in enumerate(class_figures(confusion)):
        assert one["images"] == expected[3][index]
        for name, values in zip(("precision", "recall"), expected, strict=False):
            value = None if np.isnan(values[index]) else pytest.approx(values[index])
            assert one[name] == value, (name, index)
    assert class_figures(confusion)[-1]["recall"] is None


def test_calibration_is_the_formulas(said: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = said
    believed = probabilities(logits).double().numpy()
    confidence, right = believed.max(axis=1), believed.argmax(axis=1) == labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        (bins == index).mean() * abs(confidence[bins == index].mean() - right[bins == index].mean())
        for index in np.unique(bins)
    ]
    assert calibration_error(probabilities(logits), labels) == pytest.approx(sum(gaps), abs=1e-5)
    shown = reliability(probabilities(logits), labels)
    assert sum(one["images"] for one in shown) == IMAGES
    error = sum(one["images"] * abs(one["confidence"] - one["accuracy"]) for one in shown) / IMAGES
    assert error == pytest.approx(sum(gaps), abs=1e-5)


def test_binary_cross_entropy_is_summed_over_classes() -> None:
    logits, labels = torch.randn(20, 4), torch.arange(20) % 4
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    target = np.eye(4)[labels.numpy()]
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1).mean()
    assert accuracy(logits, labels, loss="binary_cross_entropy").loss == pytest.approx(expected)
    assert torch.equal(probabilities(logits, loss="binary_cross_entropy"), logits.sigmoid())


def test_consistency_is_the_share_of_pairs_that_agree() -> None:
    shown = torch.tensor([[1, 1, 1], [1, 1, 2], [0, 1, 2]])
    assert consistency(shown) == pytest.approx((1 + 1 / 3 + 0) / 3)
    drawn = np.random.default_rng(0).integers(0, 3, (50, 4))
    pairs = [(a, b) for a in range(4) for b in range(a)]
    expected = np.mean([drawn[:, a] == drawn[:, b] for a, b in pairs])
    assert consistency(torch.from_numpy(drawn)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="two or more"):
        consistency(shown[:, :1])


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="label 3, and the network has 3 classes"):
        accuracy(torch.zeros(1, 3), torch.tensor([3]))


def test_balanced_accuracy_leaves_out_classes_without_images() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    assert accuracy(logits, torch.tensor([0, 0, 2, 2])).balanced == 0.5
    assert accuracy(logits, torch.tensor([0, 2, 2, 2])).balanced == pytest.approx((1 + 1 / 3) / 2)


def test_one_class_is_always_right() -> None:
    logits, labels = torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)
    assert accuracy(logits, labels).top1 == accuracy(logits, labels).balanced == 1
    assert calibration_error(probabilities(logits), labels) == 0
    assert confusion_matrix(labels, labels, num_classes=1).tolist() == [[5]]
