"""RandAugment: every operation against torchvision's on single images, its draws, and the round trip to pixels."""

import re
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import v2

from algos.framework.base import Event
from algos.framework.ordering import arrange
from algos.framework.randomness import generator_at
from algos.mixup import MixUp
from algos.randaugment import OPERATIONS, RandAugment, draw_randaugment, randaugment_batch
from data.loading.normalize import normalize

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TORCHVISIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(size=5, side=17):
    smooth = torch.rand(size, 3, 4, 5) * 255
    return torch.nn.functional.interpolate(smooth, size=(side, side + 2), mode="bilinear").byte()


def torchvisions(image, index, sign, magnitude, interpolation):
    """What v2.RandAugment does to one image once it has drawn."""
    theirs = v2.RandAugment(magnitude=magnitude, interpolation=v2.InterpolationMode(interpolation))
    assert set(theirs._AUGMENTATION_SPACE) == set(TORCHVISIONS)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[TORCHVISIONS[index]]
    values = magnitudes(31, *image.shape[-2:])
    value = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1)
    return theirs._apply_image_or_video_transform(
        image, TORCHVISIONS[index], value, interpolation=theirs.interpolation, fill=theirs._fill
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("magnitude", [0, 9, 15, 30])
def test_every_operation_is_torchvisions_on_each_image_alone(magnitude, interpolation):
    images = pixels()
    for index in range(len(OPERATIONS)):
        signs = torch.tensor([[1, -1, 1, -1, -1]])
        ours = randaugment_batch(
            images, operations=torch.full((1, 5), index), signs=signs, magnitude=magnitude, interpolation=interpolation
        )
        for image, sign, one in zip(images, signs[0].tolist(), ours, strict=True):
            expected = torchvisions(image, index, sign, magnitude, interpolation)
            assert torch.equal(one, expected), OPERATIONS[index]


def test_rounds_follow_each_other_and_images_keep_apart():
    images = pixels(40)
    before = images.clone()
    operations, signs = draw_randaugment(40, num_ops=3, generator=generator())
    together = randaugment_batch(images, operations=operations, signs=signs)
    assert torch.equal(images, before)
    one_by_one = images
    for row, sign in zip(operations, signs, strict=True):
        parts = zip(one_by_one, row, sign, strict=True)
        one_by_one = torch.cat(
            [randaugment_batch(i[None], operations=o.view(1, 1), signs=s.view(1, 1)) for i, o, s in parts]
        )
    assert torch.equal(together, one_by_one)


def test_memory_format_stays_and_gray_images_work():
    images = pixels().contiguous(memory_format=torch.channels_last)
    operations, signs = draw_randaugment(5, num_ops=2, generator=generator())
    assert randaugment_batch(images, operations=operations, signs=signs).is_contiguous(
        memory_format=torch.channels_last
    )
    assert randaugment_batch(images[:, :1], operations=operations, signs=signs).shape == (5, 1, 17, 19)


def test_draws_are_uniform_and_from_the_generator_alone():
    operations, signs = draw_randaugment(28000, num_ops=2, generator=generator(1))
    counts = torch.bincount(operations.flatten(), minlength=14)
    assert (counts - 4000).abs().max() < 310  # five standard deviations
    assert abs(float(signs.float().mean())) < 0.022
    assert set(signs.unique().tolist()) == {-1, 1}
    torch.manual_seed(9)
    again = draw_randaugment(28000, num_ops=2, generator=generator(1))
    assert torch.equal(again[0], operations)
    assert torch.equal(again[1], signs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(5, 3, 4, 4)}, r"type torch.float32; they must be uint8 .*augment before normalizing"),
        ({"operations": torch.zeros(2, 4, dtype=torch.int64)}, r"operations \[2, 4\] and signs \[2, 5\] for 5 images"),
        ({"operations": torch.full((2, 5), 14)}, r"operations 14..14; they must lie in 0..13"),
        ({"magnitude": 31}, "magnitude 31 must be a whole number from 0 to 30"),
        ({"interpolation": "cubic"}, "interpolation 'cubic' must be"),
    ],
)
def test_mistakes_are_refused(change, message):
    operations, signs = draw_randaugment(5, num_ops=2, generator=generator())
    with pytest.raises(ValueError, match=message):
        randaugment_batch(**{"images": pixels(), "operations": operations, "signs": signs} | change)


def test_settings_out_of_range_are_refused():
    for settings, message in [
        ({"num_ops": 0}, "num_ops 0 must be at least 1"),
        ({"mean": MEAN}, "give both"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"seed": -1}, "seed -1 must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            RandAugment(**settings)
    with pytest.raises(ValueError, match="num_samples 0"):
        draw_randaugment(0, num_ops=1, generator=generator())


# --- the class ---

LOADER = SimpleNamespace(mean=MEAN, std=STD)


def augmented(images, algorithm=None, *, step=5, loader=LOADER, run_seed=3):
    state = SimpleNamespace(
        batch=(images, torch.arange(len(images))), dataloader=loader, rank_zero_seed=run_seed, algorithms=[],
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=step)),
    )  # fmt: skip
    (algorithm or RandAugment()).apply(None, state, None)
    assert torch.equal(state.batch[1], torch.arange(len(images)))
    return state.batch[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalization_is_taken_back_exactly(dtype):
    """All 256 values of all channels, under operations that would show a pixel that is off by one."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(8, 3, 16, 16).contiguous()
    operations, signs = draw_randaugment(8, num_ops=2, generator=generator_at(3, rank=0, step=5, stream="randaugment"))
    expected = randaugment_batch(images, operations=operations, signs=signs)
    normalized = augmented(normalize(images, mean=MEAN, std=STD, dtype=dtype))
    assert normalized.dtype == dtype
    assert torch.equal(normalized, normalize(expected, mean=MEAN, std=STD, dtype=dtype))
    assert torch.equal(augmented(images), expected)  # not normalized: nothing to take back
    own = RandAugment(mean=MEAN, std=STD)
    assert torch.equal(augmented(normalize(images, mean=MEAN, std=STD, dtype=dtype), own, loader=None), normalized)


def test_draws_at_the_runs_seed_rank_and_batch(monkeypatch):
    images = pixels(8)
    assert torch.equal(augmented(images), augmented(images, RandAugment(seed=3), run_seed=8))
    distinct = [augmented(images), augmented(images, step=6), augmented(images, run_seed=4)]
    monkeypatch.setattr("algos.randaugment.global_rank", lambda: 1)
    distinct.append(augmented(images))
    assert len({tuple(one.flatten().tolist()) for one in distinct}) == 4


def test_an_unknown_or_wrong_normalization_is_refused():
    images = normalize(pixels(), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"SimpleNamespace, which does not tell its mean and std; write "):
        augmented(images, loader=SimpleNamespace())
    with pytest.raises(ValueError, match=r"not within 0..255; give RandAugment the mean and std"):
        augmented(images * 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_from_0_to_1_are_a_normalization(channels):
    images = pixels()[:, :channels]
    ours = augmented(images / 255, RandAugment(normalization="unit"), loader=SimpleNamespace())
    assert torch.equal(ours, augmented(images) / 255)


def test_imagenets_normalization_by_name_is_the_one_by_numbers():
    images = normalize(pixels(), mean=MEAN, std=STD)
    by_name = augmented(images, RandAugment(normalization="imagenet"), loader=SimpleNamespace())
    assert torch.equal(by_name, augmented(images, RandAugment(mean=MEAN, std=STD), loader=SimpleNamespace()))
    with pytest.raises(ValueError, match="images of 1 channels, and the mean has 3 numbers and the std 3; give"):
        augmented(images[:, :1], RandAugment(normalization="imagenet"))


def test_the_call_that_a_refusal_names_works():
    images = pixels() / 255
    with pytest.raises(ValueError, match="which does not tell its mean and std") as refusal:
        augmented(images, loader=SimpleNamespace())
    assert "\n" not in str(refusal.value)
    calls = re.findall(r"RandAugment\(normalization='\w+'\)", str(refusal.value))
    assert calls == ["RandAugment(normalization='imagenet')", "RandAugment(normalization='unit')"]
    augmented(images, eval(calls[1]), loader=SimpleNamespace())


def test_two_are_refused():
    state = SimpleNamespace(algorithms=[RandAugment(), RandAugment()])
    with pytest.raises(ValueError, match="RandAugment is among the Trainer's algorithms twice"):
        state.algorithms[0].match(Event.INIT, state)


def test_acts_before_mixing_whatever_the_listing():
    assert arrange({"mixup": MixUp.contract, "randaugment": RandAugment.contract}) == ["randaugment", "mixup"]
    assert arrange({"a_mix": MixUp.contract, "z": RandAugment.contract}) == ["z", "a_mix"]


def test_a_resumed_run_augments_as_the_whole_run(tmp_path):
    from composer import Trainer
    from composer.models import ComposerClassifier
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def train(epochs, **settings):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        images = normalize(torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8), mean=MEAN, std=STD)
        trainer = Trainer(
            model=ComposerClassifier(network, num_classes=4), max_duration=f"{epochs}ep", device="cpu", seed=11,
            train_dataloader=DataLoader(TensorDataset(images, torch.arange(16) % 4), batch_size=8),
            optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
            algorithms=[RandAugment(mean=MEAN, std=STD), MixUp()], progress_bar=False, **settings,
        )  # fmt: skip
        trainer.fit()
        return network[1].weight.detach().clone()

    whole = train(2)
    train(1, save_folder=str(tmp_path))
    assert torch.equal(train(2, load_path=f"{tmp_path}/ep1-ba2-rank0.pt"), whole)
