"""Crops: the distribution matches torchvision's, and a crop does not depend on the rest of its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import CenterCrop, RandomCrop, RandomResizedCrop

from data.decoding.crops import CropSettings, center_crops, random_resized_crops

N = 4000


def crops(height: int, width: int, **settings) -> np.ndarray:
    return random_resized_crops(
        np.arange(N), np.full(N, height), np.full(N, width), **({"seed": 0, "epoch": 0} | settings)
    )


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.08, 1.0)), (300, 200, (0.35, 1.0)), (40, 400, (0.5, 1.0)), (8, 8, (0.08, 1))],
)
def test_distribution_is_torchvisions(height: int, width: int, scale: tuple[float, float]):
    """Two-sample Kolmogorov-Smirnov on top, left, height, width; the bound is that of p = 1e-6."""
    own = crops(height, width, scale=scale)
    image = torch.zeros(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(N)])
    for column in range(4):
        values = np.union1d(own[:, column], theirs[:, column])
        ranks = [np.searchsorted(np.sort(x[:, column]), values, side="right") / N for x in (own, theirs)]
        assert np.abs(ranks[0] - ranks[1]).max() < np.sqrt(np.log(2 / 1e-6) / N)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (8, 8), (1, 500), (500, 1), (375, 500), (65535, 2)])
def test_crops_lie_inside_the_image(height: int, width: int):
    for rows in (crops(height, width), center_crops(np.array([height]), np.array([width]), crop_ratio=0.875)):
        top, left, crop_height, crop_width, _ = rows.T
        assert rows.dtype == np.int32
        assert top.min() >= 0
        assert left.min() >= 0
        assert min(crop_height.min(), crop_width.min()) >= 1
        assert (top + crop_height).max() <= height
        assert (left + crop_width).max() <= width


def test_a_crop_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 600, N), rng.integers(1, 600, N)
    whole = random_resized_crops(np.arange(N), heights, widths, seed=7, epoch=3)
    some = rng.permutation(N)[:100]
    assert np.array_equal(whole[some], random_resized_crops(some, heights[some], widths[some], seed=7, epoch=3))


def test_crops_differ_between_images_epochs_and_seeds():
    base = crops(375, 500)
    assert len(np.unique(base[:, :4], axis=0)) > 0.99 * N
    for other in (crops(375, 500, epoch=1), crops(375, 500, seed=1)):
        assert (base[:, :4] == other[:, :4]).all(axis=1).mean() < 0.01
        correlation = np.corrcoef(base[:, 0], other[:, 0])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(N)


def test_the_crops_of_recorded_runs_stay():
    """Golden numbers: whatever changes them changes every recorded run."""
    golden = [[7, 14, 352, 417, 1], [14, 220, 253, 242, 1], [59, 16, 309, 404, 0]]
    assert crops(375, 500)[:3].tolist() == golden


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flips(probability: float):
    flips = crops(30, 30, flip_probability=probability)[:, 4]
    assert abs(flips.mean() - probability) <= 5 * np.sqrt(probability * (1 - probability) / N)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 341), (300, 256), (257, 511)])
def test_center_crop_is_that_of_torchvision(height: int, width: int):
    """At ratio 224/256, on an image whose shorter side is 256 or so, it is CenterCrop of that side."""
    top, left, crop_height, crop_width, flip = center_crops(
        np.array([height]), np.array([width]), crop_ratio=224 / 256
    )[0]
    side = round(224 / 256 * min(height, width))
    places = torch.arange(height * width).view(1, height, width)
    assert crop_height == crop_width == side
    assert flip == 0
    assert torch.equal(places[:, top : top + side, left : left + side], CenterCrop(side)(places))


@pytest.mark.parametrize(
    "settings",
    [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.5)}, {"aspect": (0, 1)}, {"aspect": (2, 1)},
     {"crop_ratio": 0}, {"crop_ratio": 1.5}, {"flip_probability": 1.1}, {"eval_crop_ratio": 0},
     {"eval_crop_ratio": 1.2}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict):
    (value,) = settings.values()
    with pytest.raises(ValueError, match=str(value).replace("(", r"\(").replace(")", r"\)")):
        CropSettings(**settings)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (600, 300), (256, 256)])
def test_square_crops_are_those_of_resize_and_random_crop(height: int, width: int):
    """Kolmogorov-Smirnov on the place in an image resized to 256, where torchvision's RandomCrop(224) draws it."""
    settings = CropSettings(crop_ratio=224 / 256, flip_probability=0.3)
    rows = settings.rows(np.arange(N), np.full(N, height), np.full(N, width), seed=0, epoch=0, augment=True)
    assert (rows[:, 2:4] == round(224 / 256 * min(height, width))).all()
    assert abs(rows[:, 4].mean() - 0.3) < 5 * np.sqrt(0.21 / N)
    shrink = 256 / min(height, width)
    resized = torch.zeros(3, int(height * shrink), int(width * shrink))
    torch.manual_seed(0)
    theirs = np.array([RandomCrop.get_params(resized, (224, 224))[:2] for _ in range(N)])
    for column in range(2):
        own = rows[:, column] * shrink
        assert own.max() <= (height, width)[column] * shrink - 224 + shrink
        # A place in px of the one image is up to a pixel away from one in px of the other: compare the whole ones.
        values = np.arange(0, theirs[:, column].max() + 1, 8)
        ranks = [np.searchsorted(np.sort(x), values + 0.5) / N for x in (own, theirs[:, column])]
        steps = 2 * max(1.0, shrink) / (theirs[:, column].max() + 1)
        assert np.abs(ranks[0] - ranks[1]).max() < np.sqrt(np.log(2 / 1e-6) / N) + steps
