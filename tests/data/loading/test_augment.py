"""Augmentations: pixels and parameter distributions match torchvision's, and nothing else affects the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide, functional
from torchvision.transforms.v2 import RandAugment as TorchvisionRandAugment

from data import FFCVLoader, Loader, TorchLoader, digits
from data.draws import Operation, uniforms
from data.loading.augment import (
    AUGMENTATIONS,
    OPERATIONS,
    AutoContrast,
    ColorJitter,
    Cutout,
    RandAugment,
    RandomErasing,
    Rotation,
    Translate,
    TrivialAugment,
    VerticalFlip,
    _randaugment_level,
    _trivialaugment_level,
    apply_operation,
    augment_batch,
    build_augmentations,
)

pytestmark = pytest.mark.timeout(60)

SIDE = 64
BLACK = (0, 0, 0)
ALL = [
    {"name": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    {"name": "rotation", "degrees": 15},
    {"name": "translate", "max_shift": 0.1},
    {"name": "randaugment"},
    {"name": "trivialaugment"},
    {"name": "cutout", "size": 0.3},
    {"name": "random_erasing"},
    {"name": "autocontrast"},
    {"name": "vertical_flip"},
]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    image = pytest.importorskip("sklearn.datasets").load_sample_images().images[0]
    return Image.fromarray(image[100 : 100 + 3 * SIDE : 3, 200 : 200 + 3 * SIDE : 3])


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(image: Image.Image, expected: torch.Tensor) -> np.ndarray:
    return np.abs(np.asarray(image).astype(int) - expected.permute(1, 2, 0).numpy().astype(int))


def torchvision_affine(**change) -> Callable[[torch.Tensor], torch.Tensor]:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return lambda image: functional.affine(image, **still | change)


def degrees(tangent: float) -> float:
    return math.degrees(math.atan(tangent))


# name, level, torchvision's operation on tensors, which is written independently of Pillow
AGAINST_TORCHVISION = [
    ("identity", 0.0, lambda x: x),
    ("shear_x", 0.23, torchvision_affine(shear=[degrees(0.23), 0.0], center=[0, 0])),
    ("shear_y", -0.3, torchvision_affine(shear=[0.0, degrees(-0.3)], center=[0, 0])),
    ("translate_x", 7.9, torchvision_affine(translate=[7, 0])),
    ("translate_y", -5.4, torchvision_affine(translate=[0, -5])),
    ("rotate", 17.0, lambda x: functional.rotate(x, 17.0)),
    ("brightness", -0.4, lambda x: functional.adjust_brightness(x, 0.6)),
    ("brightness", 0.9, lambda x: functional.adjust_brightness(x, 1.9)),
    ("color", 0.5, lambda x: functional.adjust_saturation(x, 1.5)),
    ("contrast", -0.7, lambda x: functional.adjust_contrast(x, 0.3)),
    ("sharpness", 0.8, lambda x: functional.adjust_sharpness(x, 1.8)),
    ("posterize", 3, lambda x: functional.posterize(x, 3)),
    ("solarize", 0.4, lambda x: functional.solarize(x, 0.4 * 255)),
    ("autocontrast", 0.0, functional.autocontrast),
    ("equalize", 0.0, functional.equalize),
]


@pytest.mark.parametrize(("name", "level", "torchvisions"), AGAINST_TORCHVISION)
def test_operations_are_torchvisions(photo: Image.Image, name: str, level: float, torchvisions: Callable):
    """To one level of 255 by rounding; where pixels move, few at the borders may come from the neighbor."""
    found = difference(apply_operation(photo, name, level, "nearest", BLACK), torchvisions(as_tensor(photo)))
    if name == "rotate":
        assert (found.max(axis=-1) > 0).mean() < 0.005
    else:
        assert found.max() <= 1


def test_every_operation_is_compared():
    assert {name for name, _, _ in AGAINST_TORCHVISION} == set(OPERATIONS)


def test_levels_are_torchvisions():
    spaces = [
        (TorchvisionRandAugment._AUGMENTATION_SPACE, lambda name, m: _randaugment_level(name, m, (SIDE, SIDE))),
        (TrivialAugmentWide._AUGMENTATION_SPACE, _trivialaugment_level),
    ]
    for space, level in spaces:
        theirs = {name.lower().replace("_", ""): entry for name, entry in space.items()}
        assert set(theirs) == {name.replace("_", "") for name in OPERATIONS}
        for name in OPERATIONS:
            magnitudes = theirs[name.replace("_", "")][0](31, SIDE, SIDE)
            if magnitudes is not None:
                ours = [level(name, magnitude) for magnitude in range(31)]
                np.testing.assert_allclose(ours, magnitudes.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_rotation(photo: Image.Image):
    draws = np.array([0.9])  # of [-20, 20]: 16 degrees
    nearest = Rotation(degrees=20, interpolation="nearest").apply(photo, draws)
    assert (difference(nearest, functional.rotate(as_tensor(photo), 16.0)).max(axis=-1) > 0).mean() < 0.005
    smooth = Rotation(degrees=20).apply(photo, draws)
    expected = functional.rotate(as_tensor(photo), 16.0, interpolation=InterpolationMode.BILINEAR)
    # Bilinear filters of the two round at other bits, and treat the border of the image differently.
    assert difference(smooth, expected)[16:-16, 16:-16].mean() < 1
    filled = Rotation(degrees=180, fill=(9, 8, 7)).apply(photo, np.array([0.625]))  # 45 degrees
    assert filled.getpixel((0, 0)) == (9, 8, 7)


def test_translate(photo: Image.Image):
    draws = np.array([0.95, 0.1])  # of [-0.25, 0.25] of 64 px: 14.4 right and 12.8 up, rounded
    moved = Translate(max_shift=0.25, fill=(1, 2, 3)).apply(photo, draws)
    expected = functional.affine(
        as_tensor(photo), angle=0.0, translate=[14, -13], scale=1.0, shear=[0.0, 0.0], fill=[1.0, 2.0, 3.0]
    )
    assert difference(moved, expected).max() == 0


def test_color_jitter(photo: Image.Image):
    """Order saturation, brightness, hue, contrast; u = 0.75 of [1 - b, 1 + b] is 1 + b / 2."""
    draws = np.array([0.2, 0.8, 0.1, 0.5, 0.75, 0.75, 0.75, 0.75])
    jitter = ColorJitter(brightness=0.4, contrast=0.2, saturation=0.6, hue=0.1)
    expected = functional.adjust_saturation(as_tensor(photo), 1.3)
    expected = functional.adjust_brightness(expected, 1.2)
    expected = functional.adjust_hue(expected, 0.05)
    expected = functional.adjust_contrast(expected, 1.1)
    found = difference(jitter.apply(photo, draws), expected)
    assert found.mean() < 1.5  # Pillow's hue has 256 steps, torchvision's on tensors is a float
    only = ColorJitter(contrast=2.0).apply(photo, np.array([0, 0.1, 0.2, 0.3, 0.5, 0.0, 0.5, 0.5]))
    assert difference(only, functional.adjust_contrast(as_tensor(photo), 0.0)).max() <= 1  # never below 0
    nothing = ColorJitter().apply(photo, draws)
    assert difference(nothing, as_tensor(photo)).max() == 0


def test_hue_alone(photo: Image.Image):
    for draw, hue in ((0.9, 0.4), (0.1, -0.4)):
        draws = np.array([0, 0, 0, 0, 0, 0, 0, draw])
        turned = ColorJitter(hue=0.5).apply(photo, draws)
        assert difference(turned, functional.adjust_hue(as_tensor(photo), hue)).mean() < 1.5


def test_autocontrast_and_vertical_flip(photo: Image.Image):
    none = np.empty(0)
    assert difference(AutoContrast().apply(photo, none), functional.autocontrast(as_tensor(photo))).max() <= 1
    assert difference(VerticalFlip().apply(photo, none), functional.vertical_flip(as_tensor(photo))).max() == 0


def test_random_erasing_has_torchvisions_areas(photo: Image.Image):
    """Rectangles inside, their areas and ratios uniform (the latter in the logarithm); a tenth of a million draws."""
    erasing = RandomErasing(scale=(0.1, 0.2), aspect_ratio=(0.5, 2.0), fill=(255, 0, 255))
    blank = Image.new("RGB", (200, 200))
    draws = uniforms(np.arange(400), seed=0, epoch=0, operation=Operation.AUGMENTATION, num_draws=40)
    shares, ratios = [], []
    for row in draws:
        filled = (np.asarray(erasing.apply(blank.copy(), row)) == (255, 0, 255)).all(axis=-1)
        tall, wide = filled.any(axis=1).sum(), filled.any(axis=0).sum()
        assert filled.sum() == tall * wide > 0
        shares.append(tall * wide / 200**2)
        ratios.append(math.log2(tall / wide))
    for values, least, most in ((shares, 0.1, 0.2), (ratios, -1, 1)):
        edges = np.linspace(least, most, 5)
        counts = np.histogram(np.clip(values, least, most), edges)[0]
        assert abs(counts - 100).max() < 40  # 4.6 standard deviations
    impossible = RandomErasing(scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
    assert difference(impossible.apply(photo.copy(), draws[0]), as_tensor(photo)).max() == 0


def test_cutout():
    white = Image.new("RGB", (20, 20), (255, 255, 255))
    black = (np.asarray(Cutout(size=0.5, fill=BLACK).apply(white.copy(), np.array([0.5, 0.5]))) == 0).all(axis=-1)
    assert black.sum() == 100
    assert black[5:15, 5:15].all()
    corner = (np.asarray(Cutout(size=0.5, fill=BLACK).apply(white.copy(), np.array([0.0, 0.999]))) == 0).all(axis=-1)
    assert corner.sum() == 5 * 6
    assert corner[14:, :5].all()


@pytest.mark.parametrize("kind", ["randaugment", "trivialaugment"])
def test_every_operation_sign_and_magnitude_is_drawn_alike(kind: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(
        "data.loading.augment.apply_operation", lambda image, name, level, *_: seen.append((name, level))
    )
    monkeypatch.setattr("data.loading.augment._randaugment_level", lambda name, magnitude, size: magnitude + 1)
    monkeypatch.setattr("data.loading.augment._trivialaugment_level", lambda name, magnitude: magnitude + 1)
    augmentation = RandAugment(num_ops=1) if kind == "randaugment" else TrivialAugment()
    draws = uniforms(np.arange(14_000), seed=1, epoch=0, operation=Operation.AUGMENTATION, num_draws=3)
    for row in draws[:, : augmentation.num_draws]:
        augmentation.apply(Image.new("RGB", (4, 4)), row)
    names, levels = [name for name, _ in seen], np.array([level for _, level in seen])
    counts = {name: names.count(name) for name in OPERATIONS}
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in counts.values())
    signed = np.isin(names, OPERATIONS[1:10])
    assert (levels[~signed] > 0).all()
    assert abs((levels[signed] < 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(signed.sum())
    magnitudes = np.bincount(np.abs(levels).astype(int) - 1, minlength=31)
    if kind == "randaugment":
        assert magnitudes[9] == len(levels)
    else:
        assert abs(magnitudes - 14_000 / 31).max() < 5 * math.sqrt(14_000 / 31)


def test_pixels_depend_on_seed_epoch_index_and_place_alone():
    rng = np.random.default_rng(0)
    images, indices = rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8), np.array([7, 3, 9, 1, 0, 5])
    augmentations = build_augmentations(ALL)

    def augmented(rows: list[int], *, seed: int = 1, epoch: int = 2) -> np.ndarray:
        batch = images[rows].copy()
        augment_batch(batch, indices[rows], augmentations, seed=seed, epoch=epoch)
        return batch

    together = augmented([0, 1, 2, 3, 4, 5])
    assert not np.array_equal(together, images)
    assert np.array_equal(together, np.concatenate([augmented([row]) for row in range(6)]))
    assert np.array_equal(together[::-1], augmented([5, 4, 3, 2, 1, 0]))
    assert not np.array_equal(together, augmented([0, 1, 2, 3, 4, 5], seed=2))
    assert not np.array_equal(together, augmented([0, 1, 2, 3, 4, 5], epoch=3))
    twice = build_augmentations([{"name": "rotation", "degrees": 90}] * 2)
    draws = [
        uniforms(indices, seed=0, epoch=0, operation=Operation.AUGMENTATION + place, num_draws=2) for place in (0, 1)
    ]
    assert len(twice) == 2
    assert not np.isclose(*draws).any()


def test_probability():
    images = np.full((2000, 2, 2, 3), 200, dtype=np.uint8)
    half = build_augmentations([{"name": "cutout", "size": 1.0, "fill": [0, 0, 0], "probability": 0.5}])
    augment_batch(images, np.arange(2000), half, seed=0, epoch=0)
    share = (images != 200).any(axis=(1, 2, 3)).mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(2000)
    untouched = images.copy()
    never = build_augmentations([{"name": "cutout", "probability": 0}])
    augment_batch(images, np.arange(2000), never, seed=0, epoch=0)
    assert np.array_equal(images, untouched)


@pytest.fixture(params=["ffcv", "torch"])
def make(request: pytest.FixtureRequest, digits_beton: Path) -> Callable[..., Loader]:
    def loader(**settings) -> Loader:
        settings = {"per_device_batch_size": 128, "image_size": 16, "train": True, "num_workers": 0} | settings
        return FFCVLoader(digits_beton, **settings) if request.param == "ffcv" else TorchLoader(digits(), **settings)

    return loader


def pixels(loader: Loader) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


def test_loaders_augment_alike_for_any_workers_and_after_resuming(make: Callable[..., Loader]):
    plain, whole = pixels(make()), pixels(make(augmentations=ALL))
    assert (plain != whole).flatten(1).any(dim=1).float().mean() > 0.9
    assert torch.equal(pixels(make(augmentations=ALL, num_workers=2)), whole)
    ranks = [list(make(augmentations=ALL, rank=r, world_size=2, per_device_batch_size=64)) for r in (0, 1)]
    assert torch.equal(torch.cat([a[0] for both in zip(*ranks, strict=True) for a in both]), whole)
    resumed = make(augmentations=ALL)
    resumed.set_position(0, 5)
    assert torch.equal(pixels(resumed), whole[5 * 128 :])


def test_evaluation_and_the_test_crop_are_not_augmented(make: Callable[..., Loader]):
    for settings in ({"train": False}, {}):
        loaders = make(**settings), make(augmentations=ALL, **settings)
        for loader in loaders:
            loader.set_test_crop(True)
        assert torch.equal(pixels(loaders[0]), pixels(loaders[1]))


def test_both_loaders_do_the_same(digits_beton: Path):
    """Decoded pixels differ by rounding; a jitter and a turn keep that so."""
    chosen = {"per_device_batch_size": 64, "image_size": 20, "train": True, "num_workers": 0}
    some = [{"name": "color_jitter", "brightness": 0.4}, {"name": "rotation", "degrees": 30}, {"name": "cutout"}]
    ours = pixels(FFCVLoader(digits_beton, augmentations=some, **chosen))
    theirs = pixels(TorchLoader(digits(), augmentations=some, **chosen))
    assert (ours.int() - theirs.int()).abs().max() <= 3


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry["name"])
def test_every_name_is_one_that_is_tested(entry: dict):
    assert {e["name"] for e in ALL} == set(AUGMENTATIONS)
    (made,) = build_augmentations([entry])
    assert isinstance(made, AUGMENTATIONS[entry["name"]])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("cutout", r"augmentations\[1\] 'cutout': give a mapping with a name, one of autocontrast, color"),
        ({"size": 1}, "give a mapping with a name"),
        ({"name": "cutuot"}, r"augmentations\[1\] 'cutuot': give one of .*did you mean cutout\?"),
        ({"name": "cutout", "sise": 1}, r"cutout has no 'sise'; it has: size, fill, probability; did you mean size\?"),
        ({"name": "cutout", "size": 2}, "cutout: size 2: give a number from 0 to 1"),
        ({"name": "cutout", "size": "big"}, "size 'big': give a number"),
        ({"name": "cutout", "probability": 1.5}, "probability 1.5: give a number from 0 to 1"),
        ({"name": "cutout", "fill": [0, 0]}, r"fill \[0, 0\]: give red, green and blue"),
        ({"name": "rotation"}, "rotation: .*'degrees'"),
        ({"name": "rotation", "degrees": 200}, "degrees 200: give a number from 0 to 180"),
        ({"name": "rotation", "degrees": 5, "interpolation": "cubic"}, "interpolation 'cubic': give nearest or bil"),
        ({"name": "color_jitter", "hue": 0.6}, "hue 0.6: give a number from 0 to 0.5"),
        ({"name": "color_jitter", "brightness": float("nan")}, "brightness nan: give a number"),
        ({"name": "random_erasing", "scale": [0.5, 0.1]}, r"scale \[0.5, 0.1\]: give \(least, largest\)"),
        ({"name": "random_erasing", "scale": 0.5}, r"scale 0.5: give \(least, largest\)"),
        ({"name": "cutout", "size": [0.1, 0.2]}, "size .*: give a number"),
        ({"name": "randaugment", "magnitude": 31}, "magnitude 31: give a number from 0 to 30"),
        ({"name": "randaugment", "num_ops": 1.5}, "num_ops 1.5: give a whole number"),
        ({"name": "randaugment", "num_ops": 0}, "num_ops 0: give a number from 1"),
    ],
)
def test_mistakes(entry, message: str):
    with pytest.raises(ValueError, match=message):
        build_augmentations([{"name": "translate"}, entry])
