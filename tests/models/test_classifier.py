"""The losses of the wrapper that Composer trains."""

from __future__ import annotations

import pytest
import torch
from composer.loss import binary_cross_entropy_with_logits
from torch import nn

from models.classifier import ImageClassifier, Loss


def classifier(loss: Loss = "cross_entropy") -> ImageClassifier:
    return ImageClassifier(nn.Flatten(), num_classes=5, loss=loss)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


INDICES = torch.tensor([0, 4, 2, 2, 1, 3])


def test_cross_entropy_is_its_formula(logits) -> None:
    images = torch.zeros(6, 3, 2, 2)
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(dim=1)
    log_softmax = logits - logits.exp().sum(dim=1, keepdim=True).log()
    torch.testing.assert_close(classifier().loss(logits, (images, soft)), -(soft * log_softmax).sum(1).mean())
    expected = -log_softmax[torch.arange(6), INDICES].mean()
    torch.testing.assert_close(classifier().loss(logits, (images, INDICES)), expected)


def test_binary_cross_entropy_is_its_formula_and_composers(logits) -> None:
    model, images = classifier("binary_cross_entropy"), torch.zeros(6, 3, 2, 2)
    soft = torch.rand(6, 5, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-logits))
    expected = -(soft * p.log() + (1 - soft) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(model.loss(logits, (images, soft)), expected)
    for targets in (soft, INDICES):
        theirs = binary_cross_entropy_with_logits(logits, targets, scale_by_batch_size=True)
        assert theirs.dtype == torch.float32  # so that it is right to seven digits at most
        torch.testing.assert_close(model.loss(logits, (images, targets)), theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_evaluated_loss_is_the_mean_over_samples_of_batches_that_differ(logits, loss) -> None:
    model, images = classifier(loss), torch.zeros(6, 3, 2, 2)
    metric = model.get_metrics()["loss"]
    for part in (slice(0, 4), slice(4, 6)):
        model.update_metric((images[part], INDICES[part]), logits[part], metric)
    assert metric.compute().item() == pytest.approx(model.loss(logits, (images, INDICES)).item(), rel=1e-6)


def test_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss 'mse' must be one of cross_entropy, binary_cross_entropy"):
        classifier("mse")  # pyright: ignore[reportArgumentType]
