"""Label smoothing against its formula and PyTorch's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algos.label_smoothing import LabelSmoothing, smooth_labels
from algos.mixup import mixup_batch


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_cross_entropy_equals_pytorchs(smoothing):
    logits, targets = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    smoothed = smooth_labels(targets, smoothing=smoothing, num_classes=5)
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, smoothed), expected, rtol=0, atol=1e-14)
    soft = torch.rand(6, 5).softmax(dim=1)
    expected = F.cross_entropy(logits, soft, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, smooth_labels(soft, smoothing=smoothing)), expected)


def test_rows_hold_the_formula_and_inputs_stay():
    targets = torch.tensor([1, 0])
    rows = smooth_labels(targets, smoothing=0.2, num_classes=4)
    torch.testing.assert_close(rows, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert torch.equal(targets, torch.tensor([1, 0]))
    soft = torch.eye(4)[:2]
    smooth_labels(soft, smoothing=0.2)
    assert torch.equal(soft, torch.eye(4)[:2])


def test_ignored_rows_are_zero_and_add_nothing_to_the_sum():
    logits, targets = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    rows = smooth_labels(targets, smoothing=0.1, num_classes=3)
    assert not rows[[1, 3]].any()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(F.cross_entropy(logits, rows, reduction="sum"), expected)
    assert not smooth_labels(torch.tensor([7]), smoothing=0.1, num_classes=3, ignore_index=7).any()


def test_binary_cross_entropy_takes_the_rows():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    rows = smooth_labels(targets, smoothing=0.3, num_classes=3)
    right, wrong = 1 - 0.3 + 0.3 / 3, 0.3 / 3
    expected = torch.full((4, 3), wrong).scatter_(1, targets[:, None], right)
    torch.testing.assert_close(
        F.binary_cross_entropy_with_logits(logits, rows), F.binary_cross_entropy_with_logits(logits, expected)
    )


@pytest.mark.parametrize("lam", [0.3, torch.tensor([0.9, 0.2, 0.5, 0.7])])
def test_mixing_and_smoothing_commute(lam):
    images, targets = torch.randn(4, 3, 2, 2), torch.tensor([0, -100, 2, 1])
    permutation = torch.tensor([3, 2, 0, 1])

    def mix(labels):
        return mixup_batch(images, labels, lam=lam, permutation=permutation, num_classes=3)[1]

    smoothed_first = mix(smooth_labels(targets, smoothing=0.1, num_classes=3))
    torch.testing.assert_close(smooth_labels(mix(targets), smoothing=0.1), smoothed_first, rtol=0, atol=1e-15)


def test_microbatches_add_up_to_the_whole_batch():
    layer, images = nn.Linear(6, 3), torch.randn(8, 6)
    rows = smooth_labels(torch.arange(8) % 3, smoothing=0.1, num_classes=3)
    F.cross_entropy(layer(images), rows).backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    for part in ([0, 1, 2], [3, 4, 5], [6, 7]):
        (F.cross_entropy(layer(images[part]), rows[part]) * len(part) / 8).backward()
    torch.testing.assert_close(layer.weight.grad, whole)


def test_dtypes():
    assert smooth_labels(torch.tensor([1], dtype=torch.uint8), smoothing=0.1, num_classes=2).dtype == torch.float64
    assert smooth_labels(torch.eye(2, dtype=torch.bfloat16), smoothing=0.1).dtype == torch.bfloat16
    assert smooth_labels(torch.eye(2, dtype=torch.int64), smoothing=0.1).dtype == torch.float64


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (torch.tensor([0]), {"smoothing": 1.5, "num_classes": 2}, r"smoothing 1.5 must lie in \[0, 1\]"),
        (torch.tensor([0]), {"smoothing": -0.1, "num_classes": 2}, "smoothing -0.1"),
        (torch.tensor([0]), {"smoothing": 0.1}, "pass num_classes"),
        (torch.tensor([0, 2]), {"smoothing": 0.1, "num_classes": 2}, r"class index 2; indices must lie in 0\.\.1"),
        (torch.tensor([0, -1]), {"smoothing": 0.1, "num_classes": 2}, "class index -1"),
        (torch.tensor([0.5]), {"smoothing": 0.1, "num_classes": 2}, "squeeze or convert"),
        (torch.zeros(1, 1, 1), {"smoothing": 0.1, "num_classes": 2}, "squeeze or convert"),
        (torch.eye(3), {"smoothing": 0.1, "num_classes": 2}, "over 3 classes and num_classes 2"),
    ],
)
def test_mistakes_are_refused(targets, settings, message):
    with pytest.raises(ValueError, match=message):
        smooth_labels(targets, **settings)


def test_class_smooths_the_batch_with_the_models_classes():
    from composer.core import Event

    algorithm = LabelSmoothing(smoothing=0.2)
    assert [event for event in Event if algorithm.match(event, SimpleNamespace(algorithms=[algorithm]))] == [
        Event.BATCH_START
    ]
    images, targets = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    inner = nn.Identity()
    inner.num_classes = 4
    wrapped = nn.Module()  # as DDP wraps
    wrapped.module = inner
    for model in (inner, wrapped):
        state = SimpleNamespace(model=model, batch=[images, targets])
        algorithm.apply(Event.BATCH_START, state, None)
        assert state.batch[0] is images
        assert torch.equal(state.batch[1], smooth_labels(targets, smoothing=0.2, num_classes=4))
    state = SimpleNamespace(model=nn.Identity(), batch=(images, targets))
    LabelSmoothing(num_classes=3).apply(Event.BATCH_START, state, None)
    assert state.batch[1].shape == (2, 3)
    with pytest.raises(ValueError, match="num_classes"):
        algorithm.apply(Event.BATCH_START, SimpleNamespace(model=nn.Identity(), batch=(images, targets)), None)
    with pytest.raises(ValueError, match=r"pair of tensors \(images, targets\)"):
        algorithm.apply(Event.BATCH_START, SimpleNamespace(model=inner, batch={"image": images}), None)


def test_class_refuses_at_construction():
    with pytest.raises(ValueError, match="smoothing 2"):
        LabelSmoothing(smoothing=2)
    with pytest.raises(ValueError, match="num_classes 0"):
        LabelSmoothing(num_classes=0)
