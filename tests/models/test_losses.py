"""Weighted losses: their formulas in float64, torch's own, scikit-learn's weights, and any cut of a batch."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from algos import mixup_batch, smooth_labels
from models.classifier import ImageClassifier
from models.losses import Loss, check_class_weights, inverse_frequency_weights, sample_losses

N, K = 12, 5
COUNTS = [120, 40, 8, 3, 29]
AUTO = inverse_frequency_weights(COUNTS)
WEIGHTS = torch.tensor(AUTO, dtype=torch.float64)
LABELS = torch.tensor([0, 0, 0, 4, 1, 2, 0, 1, 0, 3, 4, 0])


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def mixed() -> Tensor:
    """Targets after MixUp and label smoothing."""
    images = torch.zeros(N, 3, 2, 2, dtype=torch.float64)
    lam = torch.linspace(0.1, 1, N, dtype=torch.float64)
    _, targets = mixup_batch(images, LABELS, lam=lam, permutation=torch.arange(N).roll(1), num_classes=K)
    return smooth_labels(targets.double(), smoothing=0.1, num_classes=K)


def test_auto_is_scikit_learns_balanced_weights_with_a_mean_over_images_of_one() -> None:
    labels = np.repeat(np.arange(K), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    np.testing.assert_allclose(WEIGHTS, expected, rtol=1e-15)
    assert WEIGHTS[labels].mean().item() == pytest.approx(1, rel=1e-14)
    np.testing.assert_allclose(WEIGHTS * torch.tensor(COUNTS), sum(COUNTS) / K, rtol=1e-14)


def test_a_class_without_images_weighs_nothing_and_the_mean_stays_one() -> None:
    weights = inverse_frequency_weights([6, 0, 2])
    assert weights == [8 / (2 * 6), 0, 8 / (2 * 2)]
    with pytest.raises(ValueError, match="no class with images"):
        inverse_frequency_weights([0, 0])


def test_cross_entropy_of_classes_is_torchs(logits: Tensor) -> None:
    ours = sample_losses(logits, LABELS, class_weights=WEIGHTS)
    torch.testing.assert_close(ours, F.cross_entropy(logits, LABELS, weight=WEIGHTS, reduction="none"))
    torch.testing.assert_close(ours, WEIGHTS[LABELS] * F.cross_entropy(logits, LABELS, reduction="none"))


def test_cross_entropy_of_mixtures_weighs_each_part(logits: Tensor, mixed: Tensor) -> None:
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    expected = torch.stack([-sum(WEIGHTS[k] * mixed[i, k] * log_p[i, k] for k in range(K)) for i in range(N)])
    torch.testing.assert_close(sample_losses(logits, mixed, class_weights=WEIGHTS), expected)
    torch.testing.assert_close(F.cross_entropy(logits, mixed, weight=WEIGHTS, reduction="none"), expected)
    smooth = smooth_labels(LABELS, smoothing=0.2, num_classes=K).double()
    theirs = F.cross_entropy(logits, LABELS, weight=WEIGHTS, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(sample_losses(logits, smooth, class_weights=WEIGHTS), theirs, rtol=1e-6, atol=0)


def test_binary_cross_entropy_weighs_a_sample_by_its_target(logits: Tensor, mixed: Tensor) -> None:
    p = 1 / (1 + torch.exp(-logits))
    for targets, rows in ((LABELS, F.one_hot(LABELS, K).double()), (mixed, mixed)):
        plain = -(rows * p.log() + (1 - rows) * (1 - p).log()).sum(1)
        ours = sample_losses(logits, targets, loss="binary_cross_entropy", class_weights=WEIGHTS)
        torch.testing.assert_close(ours, (rows * WEIGHTS).sum(1) * plain)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
def test_equal_weights_change_nothing(loss: Loss, soft: bool, logits: Tensor, mixed: Tensor) -> None:
    targets, ones = mixed if soft else LABELS, torch.ones(K, dtype=torch.float64)
    weighted = sample_losses(logits, targets, loss=loss, class_weights=ones)
    torch.testing.assert_close(weighted, sample_losses(logits, targets, loss=loss))


# --- the wrapper ---------------------------------------------------------------------------------------------------


def classifier(loss: Loss = "cross_entropy", class_weights: Any = AUTO) -> ImageClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, K)).double()
    return ImageClassifier(network, num_classes=K, loss=loss, class_weights=class_weights)


def gradient(model: ImageClassifier, batch: tuple[Tensor, Tensor], parts: list[slice], *, torchs: bool) -> Tensor:
    """Of the parts' mean losses, each times its share of the samples: what engines do with microbatches and ranks."""
    model.zero_grad()
    for part in parts:
        images, targets = batch[0][part], batch[1][part]
        outputs = model((images, targets))
        ours = F.cross_entropy(outputs, targets, weight=WEIGHTS) if torchs else model.loss(outputs, (images, targets))
        (ours * len(images) / N).backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(loss: Loss, soft: bool, mixed: Tensor) -> None:
    model, targets = classifier(loss), mixed if soft else LABELS
    batch = torch.randn(N, 3, 2, 2, dtype=torch.float64), targets
    whole = gradient(model, batch, [slice(0, N)], torchs=False)
    for cuts in ([0, 6, 12], [0, 5, 10, 12], [0, 1, 12]):
        parts = [slice(*ends) for ends in pairwise(cuts)]
        torch.testing.assert_close(gradient(model, batch, parts, torchs=False), whole, rtol=1e-6, atol=1e-12)
        if not soft and loss == "cross_entropy":  # torch's weighted mean divides by the weights of a part
            theirs = gradient(model, batch, parts, torchs=True)
            assert (theirs - gradient(model, batch, [slice(0, N)], torchs=True)).abs().max() > 1e-2


def test_weights_are_of_training_alone_and_no_state(logits: Tensor) -> None:
    model, plain = classifier(), classifier(class_weights=None)
    batch = torch.zeros(N, 3, 2, 2), LABELS
    losses = sample_losses(logits, LABELS, class_weights=WEIGHTS)
    torch.testing.assert_close(model.loss(logits, batch, reduction="none"), losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.loss(logits, batch), losses.mean(), rtol=1e-6, atol=0)
    metric = model.get_metrics()["loss"]
    model.update_metric(batch, logits, metric)
    assert metric.compute().item() == pytest.approx(plain.loss(logits, batch).item(), rel=1e-6)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [*model.buffers()] == []
    halved = copy.deepcopy(model).to(torch.bfloat16)
    of_bf16 = halved.loss(logits.bfloat16(), batch)
    assert of_bf16.dtype == torch.float32
    torch.testing.assert_close(of_bf16, model.loss(logits.bfloat16().float(), batch))


@pytest.mark.parametrize(
    ("weights", "says"),
    [([1.0, -1.0], "at least 0"), ([0.0, 0.0], "above 0"), ([float("nan"), 1.0], "finite"), ([], r"weights \(none\)")],
)
def test_weights_out_of_range_are_refused(weights: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_class_weights(weights)


def test_weights_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="received 2 class weights for 5 classes; give one for each"):
        classifier(class_weights=[1.0, 2.0])
