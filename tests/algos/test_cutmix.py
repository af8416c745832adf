"""CutMix against torchvision's and timm's formula, in the Trainer, and alternating with MixUp."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from algos.cutmix import CutMix, cutmix_batch, draw_cutmix
from algos.framework.base import Contract, Event, Resource
from algos.framework.mixing import has_turn
from algos.framework.ordering import arrange
from algos.framework.randomness import generator_at
from algos.label_smoothing import LabelSmoothing
from algos.mixup import MixUp


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(dtype=torch.float64, size=6):
    return torch.randn(size, 3, 8, 10).to(dtype), torch.arange(size) % 4


BOXES = [(0, 0, 0, 0), (2, 3, 6, 7), (0, 0, 8, 10), (5, 0, 8, 2), (3, 9, 3, 10)]


# --- the mixture ---


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("soft", [False, True])
def test_equals_torchvisions_on_the_same_box(box, soft, monkeypatch):
    images, targets = batch()
    if soft:
        targets = torch.rand(6, 4, dtype=torch.float64).softmax(dim=1)
    top, left, bottom, right = box
    lam = 1.0 - (bottom - top) * (right - left) / 80
    theirs = v2.CutMix(alpha=1.0, num_classes=4)
    monkeypatch.setattr(theirs, "make_params", lambda _: {"box": (left, top, right, bottom), "lam_adjusted": lam})
    expected = theirs(images, targets)
    mixed, rows = cutmix_batch(images, targets, box=box, permutation=torch.arange(6).roll(1), num_classes=4)
    assert torch.equal(mixed, expected[0])
    torch.testing.assert_close(rows, expected[1], check_dtype=False, rtol=0, atol=1e-7 if not soft else 1e-14)


def test_the_draw_is_timms_formula():
    """timm: cut = int(side * sqrt(1 - lam)), half = cut // 2, clipped around a uniform center."""
    for seed in range(200):
        height, width = 7 + seed % 5, 9 + seed % 7
        box, _ = draw_cutmix(2, height=height, width=width, alpha=1.0, generator=generator(seed))
        replay = generator(seed)
        torch.randperm(2, generator=replay)
        lam = float(_beta(replay))
        cut_h, cut_w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
        cy = int(torch.randint(height, (1,), generator=replay))
        cx = int(torch.randint(width, (1,), generator=replay))
        clip = lambda value, high: min(max(value, 0), high)  # noqa: E731
        assert box == (
            clip(cy - cut_h // 2, height), clip(cx - cut_w // 2, width),
            clip(cy + cut_h // 2, height), clip(cx + cut_w // 2, width),
        )  # fmt: skip


def _beta(replay):
    from algos.framework.mixing import draw_beta

    return draw_beta(1.0, generator=replay, num_samples=1)[0]


def test_one_box_a_sample_is_each_box_alone():
    images, targets = batch()
    boxes, permutation = draw_cutmix(6, height=8, width=10, alpha=1.0, generator=generator(1), per_sample=True)
    assert boxes.shape == (6, 4)
    assert len({tuple(box) for box in boxes.tolist()}) > 1
    mixed, rows = cutmix_batch(images, targets, box=boxes, permutation=permutation, num_classes=4)
    for i, box in enumerate(boxes.tolist()):
        alone = cutmix_batch(images, targets, box=tuple(box), permutation=permutation, num_classes=4)
        assert torch.equal(mixed[i], alone[0][i])
        torch.testing.assert_close(rows[i], alone[1][i])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_dtype_and_memory_format_are_kept_and_inputs_too(dtype, per_sample):
    images, targets = batch(dtype)
    images = images.to(memory_format=torch.channels_last)
    before = images.clone()
    box, permutation = draw_cutmix(6, height=8, width=10, alpha=1.0, generator=generator(), per_sample=per_sample)
    mixed, rows = cutmix_batch(images, targets, box=box, permutation=permutation, num_classes=4)
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert rows.dtype == torch.float32
    assert torch.equal(images, before)


@pytest.mark.parametrize("per_sample", [False, True])
def test_targets_have_exactly_the_share_of_the_pixels(per_sample):
    """Each sample's pixels are its own number, so what is left of it can be counted; the heavier label is its own."""
    targets = torch.arange(6)
    images = targets.double().view(6, 1, 1, 1).expand(6, 1, 8, 10)
    for seed in range(30):
        box, permutation = draw_cutmix(
            6, height=8, width=10, alpha=1.0, generator=generator(seed), per_sample=per_sample
        )
        mixed, rows = cutmix_batch(images, targets, box=box, permutation=permutation, num_classes=6)
        shares = torch.stack([(mixed == k).double().mean(dim=(1, 2, 3)) for k in range(6)], dim=1)
        torch.testing.assert_close(rows.double(), shares, rtol=0, atol=1e-6)
        heavier = shares.max(dim=1).values > 0.501
        assert torch.equal(rows.argmax(dim=1)[heavier], shares.argmax(dim=1)[heavier])


def test_the_area_follows_beta_where_nothing_is_clipped():
    boxes, permutation = draw_cutmix(4000, height=4096, width=4096, alpha=1.0, generator=generator(), per_sample=True)
    assert torch.equal(permutation.sort().values, torch.arange(4000))
    top, left, bottom, right = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (boxes <= 4096).all()
    inside = (top > 0) & (left > 0) & (bottom < 4096) & (right < 4096)
    aspect = ((bottom - top)[inside] - (right - left)[inside]).abs()
    assert aspect.max() == 0
    # A side s around a uniform center keeps s - s²/4 of the axis; s = √(1 - lam) with lam uniform.
    share = ((bottom - top) * (right - left)).double() / 4096**2
    sides = torch.linspace(0, 1, 100001, dtype=torch.float64).sqrt()
    expected = float(((sides - sides**2 / 4) ** 2).mean())
    assert abs(float(share.mean()) - expected) < 0.015


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(6, 80)}, r"must be \[N, C, H, W\]"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "6 images and 5 targets"),
        ({"num_classes": None}, "pass num_classes"),
        ({"box": (0, 0, 9, 1)}, r"box \(0, 0, 9, 1\) for images of 8 x 10 px"),
        ({"box": (3, 0, 2, 1)}, "within the image"),
        ({"box": torch.zeros(5, 4, dtype=torch.int64)}, r"boxes of shape \[5, 4\]"),
        ({"box": torch.zeros(6, 4)}, "must be integers"),
        ({"box": torch.full((6, 4), -1)}, "within the image"),
        ({"permutation": torch.arange(5)}, r"permutation of shape \[5\] for 6 images"),
    ],
)
def test_mistakes_are_refused(change, message):
    images, targets = batch()
    arguments = {
        "images": images, "targets": targets, "box": (0, 0, 1, 1), "permutation": torch.arange(6), "num_classes": 4,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cutmix_batch(**arguments)


def test_settings_out_of_range_are_refused():
    for settings, message in [
        ({"alpha": 0}, "alpha 0 must be above 0"),
        ({"switch_probability": 1.5}, r"switch_probability 1.5 must lie in \[0, 1\]"),
        ({"seed": -1}, "seed -1 must be 0 or more"),
        ({"num_classes": 0}, "num_classes 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            CutMix(**settings)
    with pytest.raises(ValueError, match="height 0 must be at least 1"):
        draw_cutmix(2, height=0, width=3, alpha=1.0, generator=generator())


# --- the class, and turns ---


def state_at(step, algorithms, *, run_seed=3):
    torch.manual_seed(0)
    model = nn.Identity()
    model.num_classes = 4
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=step))
    return SimpleNamespace(
        model=model, batch=batch(), timestamp=timestamp, rank_zero_seed=run_seed, algorithms=algorithms
    )


def test_class_draws_at_the_runs_seed_rank_and_batch(monkeypatch):
    def cut(step, algorithm, *, run_seed=3):
        state = state_at(step, [algorithm], run_seed=run_seed)
        algorithm.apply(None, state, None)
        return state.batch[0]

    targets = batch()[1]
    drawn = generator_at(3, rank=0, step=8, stream="cutmix")
    box, permutation = draw_cutmix(6, height=8, width=10, alpha=1.0, generator=drawn)
    expected = cutmix_batch(state_at(0, []).batch[0], targets, box=box, permutation=permutation, num_classes=4)[0]
    assert torch.equal(cut(8, CutMix()), expected)
    assert torch.equal(cut(8, CutMix(seed=3), run_seed=99), expected)
    distinct = [cut(8, CutMix()), cut(9, CutMix()), cut(8, CutMix(seed=4)), cut(8, CutMix(per_sample=True))]
    monkeypatch.setattr("algos.cutmix.global_rank", lambda: 1)
    distinct.append(cut(8, CutMix()))
    assert len({tuple(one.flatten().tolist()) for one in distinct}) == len(distinct)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_exactly_one_of_cutmix_and_mixup_has_a_batch_in_either_order(probability):
    cutmix, mixup = CutMix(switch_probability=probability), MixUp()
    turns = []
    for step in range(400):
        one, other = state_at(step, [cutmix, mixup]), state_at(step, [mixup, cutmix])
        turn = has_turn(cutmix, one)
        assert has_turn(cutmix, other) == turn
        assert has_turn(mixup, one) == has_turn(mixup, other) == (not turn)
        turns.append(turn)
    share = sum(turns) / len(turns)
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 400)


def test_turns_differ_with_the_run_and_not_with_the_rank_or_the_algorithms_own_seeds(monkeypatch):
    cutmix, mixup = CutMix(seed=1), MixUp(seed=2)
    turns = lambda seed: [has_turn(cutmix, state_at(n, [cutmix, mixup], run_seed=seed)) for n in range(60)]  # noqa: E731
    first = turns(3)
    assert turns(4) != first
    monkeypatch.setattr("algos.cutmix.global_rank", lambda: 5)
    assert turns(3) == first


@pytest.mark.parametrize("others", [[CutMix(), CutMix()], [MixUp(), MixUp()], [MixUp(), CutMix(), MixUp()]])
def test_two_of_a_kind_are_refused_at_the_start(others):
    state = state_at(0, others)
    with pytest.raises(ValueError, match="among the Trainer's algorithms twice"):
        others[0].match(Event.INIT, state)


def test_another_mixer_beside_cutmix_is_refused_at_the_first_batch():
    from algos.framework.registry import maker

    cutmix = CutMix()
    state = state_at(0, [cutmix, maker("composer.mixup")()])
    with pytest.raises(ValueError, match=r"CutMix and MixUp would mix .*; this project.s MixUp and CutMix take turns"):
        cutmix.apply(None, state, None)


def test_contracts_order_augmentation_then_mixing_then_smoothing_and_allow_the_pair():
    contracts = {
        "cutmix": CutMix.contract,
        "label_smoothing": LabelSmoothing.contract,
        "mixup": MixUp.contract,
        "z_augment": Contract(writes=[Resource.IMAGES]),
    }
    assert arrange(contracts) == ["z_augment", "cutmix", "mixup", "label_smoothing"]
    with pytest.raises(ValueError, match="both decide how samples are mixed"):
        arrange(contracts | {"another": MixUp.contract})


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
    samples = TensorDataset(torch.randn(32, 3, 4, 4, dtype=torch.float64), torch.arange(32) % 4)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(samples, batch_size=8), max_duration=f"{epochs}ep", device="cpu",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1), algorithms=algorithms, seed=11,
        device_train_microbatch_size=microbatch, progress_bar=False, log_to_console=False, **settings,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return list(network.parameters()), torch.cat(loss.targets)


def test_trainer_trains_alike_at_every_microbatch_size_in_either_order_and_after_resuming(tmp_path):
    algorithms = lambda: [CutMix(), MixUp(alpha=1.0), LabelSmoothing(smoothing=0.1)]  # noqa: E731
    whole, targets = train(algorithms(), epochs=2)
    assert (targets.sum(dim=1) - 1).abs().max() < 1e-6
    assert ((targets > 0.026).sum(dim=1) <= 2).all()  # at most two samples in an image: never cut and mixed
    small, small_targets = train(algorithms(), epochs=2, microbatch=2)
    torch.testing.assert_close(small_targets, targets, rtol=0, atol=1e-12)
    other_order, _ = train([MixUp(alpha=1.0), CutMix(), LabelSmoothing(smoothing=0.1)], epochs=2)
    train(algorithms(), save_folder=str(tmp_path), run_name="a")
    resumed, _ = train(algorithms(), epochs=2, load_path=f"{tmp_path}/ep1-ba4-rank0.pt")
    for one, two, three, four in zip(whole, small, resumed, other_order, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
        assert torch.equal(three, one)
        assert torch.equal(four, one)
    alone, _ = train([CutMix(), LabelSmoothing(smoothing=0.1)], epochs=2)
    assert not torch.equal(alone[0], whole[0])
