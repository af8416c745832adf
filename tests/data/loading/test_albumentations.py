"""The loaders' crop and color jitter match albumentations': the same distributions, the same pixels to rounding.

Runs if albumentations 2 is installed. The tests compare outcomes: the effect of each on an image that reveals exactly
one parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data.decoding.crops import random_resized_crops
from data.loading.augment import ColorJitter, augment_batch

albumentations = pytest.importorskip("albumentations", reason="albumentations is not installed")

N = 8000
SETTINGS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
SIDE = 8


def two_tones(first: tuple[int, int, int], second: tuple[int, int, int]) -> np.ndarray:
    image = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    image[: SIDE // 2], image[SIDE // 2 :] = first, second
    return image


def hue(images: np.ndarray) -> np.ndarray:
    """Degrees, in [-180, 180), of the first pixel."""
    red, green, blue = images[:, 0, 0].astype(float).T
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))


# parameter -> an image that shows it, and what of the outcome is compared
SHOWN: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
    "brightness": (two_tones((120, 120, 120), (160, 160, 160)), lambda x: x.mean(axis=(1, 2, 3))),
    "contrast": (two_tones((90, 90, 90), (150, 150, 150)), lambda x: x.std(axis=(1, 2, 3))),
    "saturation": (two_tones((170, 100, 100), (170, 100, 100)), lambda x: np.ptp(x[:, 0, 0].astype(float), axis=-1)),
    "hue": (two_tones((200, 60, 60), (200, 60, 60)), hue),
}


def kolmogorov_smirnov(ours: np.ndarray, theirs: np.ndarray, *, rounding: float) -> float:
    """The largest gap between the two distributions, as seen at steps of `rounding`, within which both round."""
    edges = np.arange(min(ours.min(), theirs.min()), max(ours.max(), theirs.max()) + rounding, rounding)
    ranks = [np.searchsorted(np.sort(x), edges + rounding / 2) / len(x) for x in (ours, theirs)]
    return float(np.abs(ranks[0] - ranks[1]).max())


BOUND = np.sqrt(np.log(2 / 1e-6) / N)  # of two samples of N from one distribution, but once in a million


@pytest.mark.parametrize("parameter", SETTINGS)
def test_each_parameters_outcomes_are_distributed_alike(parameter: str) -> None:
    image, shown = SHOWN[parameter]
    images = np.repeat(image[None], N, axis=0)
    settings = {name: SETTINGS[name] if name == parameter else 0.0 for name in SETTINGS}
    augment_batch(images, np.arange(N), [ColorJitter(**settings, probability=0.5)], seed=0, epoch=0)
    jitter = albumentations.Compose([albumentations.ColorJitter(**settings, p=0.5)], seed=0)
    theirs = np.stack([jitter(image=image)["image"] for _ in range(N)])
    # A level of 255 for most; both turn hues in steps, albumentations by 2 degrees.
    gap = kolmogorov_smirnov(shown(images), shown(theirs), rounding=4.0 if parameter == "hue" else 2.0)
    assert gap < BOUND
    untouched = [(batch == image).all(axis=(1, 2, 3)).mean() for batch in (images, theirs)]
    assert untouched == pytest.approx([0.5, 0.5], abs=0.04)


@pytest.mark.parametrize(("parameter", "factors"), [(name, (0.62, 0.9, 1.37)) for name in SETTINGS if name != "hue"])
def test_the_same_factor_makes_the_same_pixels(parameter: str, factors: tuple[float, ...]) -> None:
    photo = _photo()
    for factor in factors:
        chosen = dict.fromkeys(("brightness", "contrast", "saturation"), (1.0, 1.0)) | {parameter: (factor, factor)}
        theirs = albumentations.ColorJitter(**chosen, hue=(0, 0), p=1)(image=photo)["image"]
        draw = (factor - 0.6) / 0.8
        ours = ColorJitter(**{parameter: 0.4}).apply(Image.fromarray(photo), np.array([0, 0, 0, 0] + [draw] * 4))
        assert np.abs(np.asarray(ours).astype(int) - theirs.astype(int)).max() <= 2


def test_the_same_turn_of_hue_makes_the_same_pixels() -> None:
    photo = _photo()
    for turn in (-0.2, 0.1):  # of the circle
        theirs = albumentations.ColorJitter((1, 1), (1, 1), (1, 1), hue=(turn, turn), p=1)(image=photo)["image"]
        draw = (turn + 0.2) / 0.4
        ours = ColorJitter(hue=0.2).apply(Image.fromarray(photo), np.array([0, 0, 0, 0] + [draw] * 4))
        assert np.abs(np.asarray(ours).astype(int) - theirs.astype(int)).mean() < 2  # both know hues in steps alone


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 200)])
def test_crops_are_distributed_alike(height: int, width: int) -> None:
    crop = albumentations.RandomResizedCrop(size=(224, 224))
    crop.set_random_seed(0)
    found = []
    for _ in range(N):
        left, top, right, bottom = crop.get_params_dependent_on_data({"shape": (height, width, 3)}, {})["crop_coords"]
        found.append((top, left, bottom - top, right - left))
    theirs = np.array(found)
    ours = random_resized_crops(np.arange(N), np.full(N, height), np.full(N, width), seed=0, epoch=0)
    for column in range(4):
        assert kolmogorov_smirnov(ours[:, column], theirs[:, column], rounding=2.0) < BOUND


def _photo() -> np.ndarray:
    image = pytest.importorskip("sklearn.datasets").load_sample_images().images[0]
    return np.ascontiguousarray(image[100:164, 200:264])
