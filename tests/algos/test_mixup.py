"""MixUp against torchvision's, against the paper's formula, and in the Trainer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from algos.framework.randomness import generator_at
from algos.label_smoothing import LabelSmoothing, smooth_labels
from algos.mixup import MixUp, draw_mixup, mixup_batch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(dtype=torch.float64, size=6):
    return torch.randn(size, 3, 4, 5, dtype=dtype), torch.arange(size) % 4


# --- the mixture ---


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_equals_torchvisions_on_the_same_draw(lam, soft, monkeypatch):
    images, targets = batch()
    if soft:
        targets = torch.rand(6, 4, dtype=torch.float64).softmax(dim=1)
    theirs = v2.MixUp(alpha=1.0, num_classes=4)
    monkeypatch.setattr(theirs, "make_params", lambda _: {"lam": lam})
    expected = theirs(images, targets)
    permutation = torch.arange(6).roll(1)
    mixed = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=4)
    for ours, reference in zip(mixed, expected, strict=True):
        torch.testing.assert_close(ours, reference, check_dtype=False, rtol=0, atol=1e-7 if not soft else 1e-14)


def test_equals_timms_formula_with_its_smoothing():
    """timm pairs samples with the flipped batch and smooths both labels before it mixes them."""
    images, targets = batch()
    lam, smoothing = 0.35, 0.1
    off = smoothing / 4
    smooth = torch.full((6, 4), off).scatter_(1, targets[:, None], 1 - smoothing + off)
    rows = smooth_labels(targets, smoothing=smoothing, num_classes=4)
    mixed, ours = mixup_batch(images, rows, lam=lam, permutation=torch.arange(6).flip(0))
    torch.testing.assert_close(mixed, images * lam + images.flip(0) * (1 - lam))
    torch.testing.assert_close(ours, smooth * lam + smooth.flip(0) * (1 - lam))


def test_one_lam_a_sample_is_the_formula_written_out():
    images, targets = batch()
    lam, permutation = torch.rand(6, dtype=torch.float64), torch.randperm(6)
    mixed, rows = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=4)
    one_hot = F.one_hot(targets, 4).double()
    for i, j in enumerate(permutation.tolist()):
        torch.testing.assert_close(mixed[i], lam[i] * images[i] + (1 - lam[i]) * images[j])
        torch.testing.assert_close(rows[i].double(), lam[i] * one_hot[i] + (1 - lam[i]) * one_hot[j], rtol=0, atol=1e-7)


def test_a_constant_lam_tensor_is_that_number():
    images, targets = batch()
    permutation = torch.randperm(6)
    one = mixup_batch(images, targets, lam=0.3, permutation=permutation, num_classes=4)
    many = mixup_batch(images, targets, lam=torch.full((6,), 0.3), permutation=permutation, num_classes=4)
    for ours, theirs in zip(one, many, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_mixed_loss_is_the_mixture_of_the_losses():
    """The paper's implementation mixes two cross entropies; soft targets give the same number."""
    images, targets = batch()
    logits, permutation, lam = torch.randn(6, 4, dtype=torch.float64), torch.randperm(6), 0.3
    rows = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=4)[1].double()
    expected = lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[permutation])
    torch.testing.assert_close(F.cross_entropy(logits, rows), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lam", [0.3, torch.rand(6)])
def test_dtype_and_memory_format_are_kept_and_inputs_too(dtype, lam):
    images, targets = batch(dtype)
    images = images.to(memory_format=torch.channels_last)
    before = images.clone()
    mixed, rows = mixup_batch(images, targets, lam=lam, permutation=torch.randperm(6), num_classes=4)
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert rows.dtype == torch.float32
    assert torch.equal(images, before)


def test_the_heaviest_label_is_the_heavier_sample():
    images, targets = batch()
    permutation = torch.arange(6).roll(1)
    for lam, expected in ((0.7, targets), (0.3, targets[permutation])):
        rows = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=4)[1]
        assert torch.equal(rows.argmax(dim=1), expected)


# --- the draw ---


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_lam_follows_beta(alpha):
    lam, permutation = draw_mixup(20000, alpha=alpha, generator=generator(), per_sample=True)
    assert lam.dtype == torch.float32
    assert torch.equal(permutation.sort().values, torch.arange(20000))
    reference = torch.distributions.Beta(alpha, alpha).sample((20000,))
    grid = torch.linspace(0.01, 0.99, 50)
    distance = ((lam[:, None] <= grid).float().mean(0) - (reference[:, None] <= grid).float().mean(0)).abs().max()
    assert distance < 0.02  # Kolmogorov-Smirnov: 0.0195 at 0.1 % for two samples of 20000
    single, _ = draw_mixup(4, alpha=alpha, generator=generator())
    assert isinstance(single, float)
    assert 0 <= single <= 1


def test_tiny_alpha_stays_finite():
    lam, _ = draw_mixup(1000, alpha=1e-4, generator=generator(), per_sample=True)
    assert torch.isfinite(lam).all()
    assert ((lam < 1e-3) | (lam > 0.999)).float().mean() > 0.99


def test_the_generator_is_the_only_source_of_chance():
    torch.manual_seed(1)
    first = draw_mixup(8, alpha=0.2, generator=generator(5))
    torch.manual_seed(2)
    second = draw_mixup(8, alpha=0.2, generator=generator(5))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert draw_mixup(8, alpha=0.2, generator=generator(6))[0] != first[0]


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}, "uint8 images; mixing needs floating point"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "6 images and 5 targets"),
        ({"num_classes": None}, "pass num_classes"),
        ({"lam": 1.5}, r"lam 1.5 must lie in \[0, 1\]"),
        ({"lam": torch.full((6,), -0.5)}, r"must lie in \[0, 1\]"),
        ({"lam": torch.zeros(5)}, r"lam of shape \[5\] for 6 images"),
        ({"permutation": torch.arange(5)}, r"permutation of shape \[5\] for 6 images"),
        ({"permutation": torch.zeros(6, dtype=torch.int64)}, "some sample is missing"),
    ],
)
def test_mistakes_are_refused(change, message):
    images, targets = batch()
    arguments = {
        "images": images, "targets": targets, "lam": 0.5, "permutation": torch.arange(6), "num_classes": 4,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mixup_batch(**arguments)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match=r"alpha .* must be above 0"):
        draw_mixup(4, alpha=alpha, generator=generator())
    with pytest.raises(ValueError, match=r"alpha .* must be above 0"):
        MixUp(alpha=alpha)


def test_class_refuses_at_construction():
    with pytest.raises(ValueError, match="seed -1 must be 0 or more"):
        MixUp(seed=-1)
    with pytest.raises(ValueError, match="num_classes 0"):
        MixUp(num_classes=0)
    with pytest.raises(ValueError, match="num_samples 0"):
        draw_mixup(0, alpha=1, generator=generator())


# --- the class ---


def state_at(step, *, run_seed=3):
    model = nn.Identity()
    model.num_classes = 4
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=step))
    return SimpleNamespace(model=model, batch=batch(), timestamp=timestamp, rank_zero_seed=run_seed, algorithms=[])


def mixed_at(step, algorithm=None, *, run_seed=3, monkeypatch=None, rank=0):
    from composer.core import Event

    torch.manual_seed(0)
    state = state_at(step, run_seed=run_seed)
    if monkeypatch is not None:
        monkeypatch.setattr("algos.mixup.global_rank", lambda: rank)
    (algorithm or MixUp()).apply(Event.BATCH_START, state, None)
    return state.batch[0]


def test_class_draws_at_the_runs_seed_rank_and_batch(monkeypatch):
    images, targets = batch()
    lam, permutation = draw_mixup(6, alpha=0.2, generator=generator_at(3, rank=0, step=7, stream="mixup"))
    expected = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=4)[0]
    assert torch.equal(mixed_at(7), expected)
    assert torch.equal(mixed_at(7, MixUp(seed=3), run_seed=99), expected)
    assert torch.equal(mixed_at(7, MixUp(seed=4)), mixed_at(7, run_seed=4))
    distinct = [
        mixed_at(7), mixed_at(8), mixed_at(7, run_seed=4), mixed_at(7, monkeypatch=monkeypatch, rank=1),
        mixed_at(7, MixUp(per_sample=True)), mixed_at(7, MixUp(alpha=1.0)),
    ]  # fmt: skip
    assert len({tuple(images.flatten().tolist()) for images in distinct}) == len(distinct)


def test_class_acts_once_a_batch():
    from composer.core import Event

    assert [event for event in Event if MixUp().match(event, SimpleNamespace(algorithms=[]))] == [Event.BATCH_START]


class _Loss:
    """Cross entropy that keeps the targets it was given."""

    def __init__(self):
        self.targets = []

    def __call__(self, logits, targets):
        self.targets.append(targets.clone())
        return F.cross_entropy(logits, targets)


def train(algorithms, *, epochs=1, microbatch=8, **settings):
    from composer import Trainer
    from composer.models import ComposerClassifier
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    loss = _Loss()
    model = ComposerClassifier(network, num_classes=4, loss_fn=loss)
    samples = TensorDataset(torch.randn(16, 3, 4, 4, dtype=torch.float64), torch.arange(16) % 4)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(samples, batch_size=8), max_duration=f"{epochs}ep", device="cpu",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1), algorithms=algorithms, seed=11,
        device_train_microbatch_size=microbatch, progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return list(network.parameters()), torch.cat(loss.targets)


def test_trainer_mixes_and_smooths_alike_at_every_microbatch_size_and_after_resuming(tmp_path):
    algorithms = lambda: [MixUp(alpha=1.0), LabelSmoothing(smoothing=0.1)]  # noqa: E731
    whole, targets = train(algorithms(), epochs=2)
    assert (targets.sum(dim=1) - 1).abs().max() < 1e-6
    assert targets.min() > 0.02  # smoothed: 0.1 / 4
    small, small_targets = train(algorithms(), epochs=2, microbatch=2)
    torch.testing.assert_close(small_targets, targets, rtol=0, atol=1e-12)
    train(algorithms(), save_folder=str(tmp_path), run_name="a")
    resumed, _ = train(algorithms(), epochs=2, load_path=f"{tmp_path}/ep1-ba2-rank0.pt")
    for one, two, three in zip(whole, small, resumed, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
        assert torch.equal(three, one)
    plain, _ = train([], epochs=2)
    assert not torch.equal(plain[0], whole[0])
