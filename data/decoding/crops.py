"""Crop rows (top, left, height, width, flip) of a batch, as pure functions of the image indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ..draws import Operation, copies_of, images_of, uniforms

Flip = Literal["random", "alternating", "none"]
_ATTEMPTS = 10  # torchvision's number; after that it falls back to a center crop


@dataclass(frozen=True)
class CropSettings:
    """How a loader crops, in training and in evaluation.

    scale: range of a training crop's share of the image's area, within (0, 1].
    aspect: range of a training crop's width / height.
    crop_ratio: side of a training crop over the image's shorter side, within (0, 1]: a randomly placed square, in place
        of scale and aspect. 0.875 is "resize to 256, crop 224 at random". None crops by scale and aspect.
    flip: which images training mirrors left to right; see `mirrored`.
    flip_probability: of a `random` flip, 0..1.
    eval_crop_ratio: side of the evaluation crop over the image's shorter side, within (0, 1]. 0.875 is the usual
        "resize to 256, take the central 224".
    """

    scale: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    crop_ratio: float | None = None
    flip: Flip = "random"
    flip_probability: float = 0.5
    eval_crop_ratio: float = 0.875

    def __post_init__(self) -> None:
        if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise ValueError(f"crop scale {self.scale}: give (least, largest) share of the area, above 0 and up to 1")
        if not (len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1]):
            raise ValueError(f"crop aspect {self.aspect}: give (least, largest) width / height, 0 < least <= largest")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop ratio {self.crop_ratio}: give a number above 0 and up to 1, or None for crop scale")
        check_flip(self.flip, self.flip_probability)
        if not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"eval crop ratio {self.eval_crop_ratio}: give a number above 0 and up to 1")

    def rows(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, *, seed: int, epoch: int, augment: bool
    ) -> np.ndarray:
        """Crop rows [B, 5] of a batch: random ones if `augment`, else the evaluation crop."""
        if not augment:
            return center_crops(heights, widths, crop_ratio=self.eval_crop_ratio)
        flips = {"flip": self.flip, "flip_probability": self.flip_probability}
        drawn: dict[str, Any] = {"seed": seed, "epoch": epoch, **flips}
        if self.crop_ratio is not None:
            return random_square_crops(indices, heights, widths, crop_ratio=self.crop_ratio, **drawn)
        return random_resized_crops(indices, heights, widths, scale=self.scale, aspect=self.aspect, **drawn)


def random_resized_crops(
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    scale: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: Flip = "random",
    flip_probability: float = 0.5,
) -> np.ndarray:
    """Crops distributed as in torchvision's RandomResizedCrop and RandomHorizontalFlip.

    An image's crop depends on the seed, the epoch and its own index, never on the rest of the batch.

    Args:
        indices, heights, widths: [B]; heights and widths in px.
        scale: range of the crop's share of the image's area, within (0, 1].
        aspect: range of the crop's width / height.
        flip, flip_probability: see `mirrored`.

    Returns:
        int32 [B, 5]: top, left, height, width in px, and 1 where the crop is to be flipped left to right.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    draws = uniforms(indices, seed=seed, epoch=epoch, operation=Operation.CROP, num_draws=4 * _ATTEMPTS)
    draw_area, draw_aspect, draw_top, draw_left = draws.reshape(-1, _ATTEMPTS, 4).transpose(2, 0, 1)
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * draw_area)
    log_least, log_most = math.log(aspect[0]), math.log(aspect[1])
    ratio = np.exp(log_least + (log_most - log_least) * draw_aspect)
    crop_width = np.round(np.sqrt(area * ratio)).astype(np.int64)
    crop_height = np.round(np.sqrt(area / ratio)).astype(np.int64)
    room_below, room_right = heights[:, None] - crop_height, widths[:, None] - crop_width
    fits = (crop_width > 0) & (crop_height > 0) & (room_below >= 0) & (room_right >= 0)
    top = np.floor(draw_top * (room_below + 1))
    left = np.floor(draw_left * (room_right + 1))

    flips = mirrored(indices, seed=seed, epoch=epoch, flip=flip, flip_probability=flip_probability)[:, None]
    attempts = np.stack([top, left, crop_height, crop_width], axis=-1)
    chosen = np.take_along_axis(attempts, fits.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    chosen = np.where(fits.any(axis=1, keepdims=True), chosen, _fallback_crops(heights, widths, aspect))
    return np.concatenate([chosen, flips], axis=1).astype(np.int32)


def random_square_crops(
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    crop_ratio: float,
    flip: Flip = "random",
    flip_probability: float = 0.5,
) -> np.ndarray:
    """Randomly placed squares whose side is `crop_ratio` of the image's shorter side.

    Resized to S px they are distributed as in torchvision's Resize(S / crop_ratio) and RandomCrop(S), up to pixel
    rounding. Arguments and result are those of `random_resized_crops`.
    """
    squares = center_crops(heights, widths, crop_ratio=crop_ratio)
    room = np.stack([heights, widths], axis=1) - squares[:, 2:4]
    draws = uniforms(indices, seed=seed, epoch=epoch, operation=Operation.CROP, num_draws=2)
    squares[:, :2] = np.floor(draws * (room + 1))
    squares[:, 4] = mirrored(indices, seed=seed, epoch=epoch, flip=flip, flip_probability=flip_probability)
    return squares


def center_crops(heights: np.ndarray, widths: np.ndarray, *, crop_ratio: float) -> np.ndarray:
    """The central square whose side is `crop_ratio` of the image's shorter side.

    Resizing it to S px equals "resize the shorter side to S / crop_ratio, then take the central S px".

    Returns:
        int32 [B, 5]: top, left, height, width in px, and 0 for no flip.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    side = np.maximum(1, np.round(crop_ratio * np.minimum(heights, widths)))
    top, left = np.round((heights - side) / 2), np.round((widths - side) / 2)
    return np.stack([top, left, side, side, np.zeros_like(side)], axis=1).astype(np.int32)


def mirrored(
    indices: np.ndarray, *, seed: int, epoch: int, flip: Flip = "random", flip_probability: float = 0.5
) -> np.ndarray:
    """Which images are mirrored left to right in an epoch: bool [B].

        random:       u(seed, epoch, image) < flip_probability, with u uniform in [0, 1)
        alternating:  u(seed, 0, image) < 1/2, exclusive or: epoch + copy is odd
        none:         never

    Alternating (Jordan 2024, arXiv 2404.00498, section 3.6): an image that is mirrored in one epoch is not in the next,
    so any two epochs in a row show both; the first epoch is that of `random`. copy is 0, unless an epoch shows an
    image several times, as balanced sampling does: then its copies alternate too.

    indices: images, or occurrences of them (`data.draws.occurrences`).
    """
    if flip == "none":
        return np.zeros(len(indices), dtype=bool)
    if flip == "random":
        return uniforms(indices, seed=seed, epoch=epoch, operation=Operation.FLIP)[:, 0] < flip_probability
    first = uniforms(images_of(indices), seed=seed, epoch=0, operation=Operation.FLIP)[:, 0] < 0.5
    return first ^ ((epoch + copies_of(indices)) % 2 == 1)


def check_flip(flip: str, flip_probability: float) -> None:
    """Raise ValueError unless `mirrored` takes the two, and a probability goes with a random flip."""
    if flip not in get_args(Flip):
        raise ValueError(f"flip {flip!r}: give one of {', '.join(get_args(Flip))}")
    if not 0 <= flip_probability <= 1:
        raise ValueError(f"flip probability {flip_probability}: give a number from 0 to 1")
    if flip != "random" and flip_probability != CropSettings.flip_probability:
        raise ValueError(
            f"flip probability {flip_probability} beside flip {flip!r}, which uses none: set it to "
            f"{CropSettings.flip_probability}, or leave one of the two out"
        )


def _fallback_crops(heights: np.ndarray, widths: np.ndarray, aspect: tuple[float, float]) -> np.ndarray:
    # The largest centered crop of an allowed aspect, for images so elongated that no attempt fits.
    ratio = widths / heights
    crop_width = np.where(ratio > aspect[1], np.maximum(1, np.round(heights * aspect[1])), widths)
    crop_height = np.where(ratio < aspect[0], np.maximum(1, np.round(widths / aspect[0])), heights)
    return np.stack([(heights - crop_height) // 2, (widths - crop_width) // 2, crop_height, crop_width], axis=1)
