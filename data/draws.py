"""Random numbers as a pure function of (seed, epoch, image, operation, draw).

A generator has state, so its numbers depend on earlier draws: on the number of workers and ranks, and on whether the
run was resumed. A counter-based hash has none, so the same image in the same epoch is always cropped the same way.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2**64 divided by the golden ratio
_IMAGE_BITS = 36  # of an occurrence; the bits above them are the number of the copy


class Operation(IntEnum):
    """What the numbers are for. Never reuse or change a value: that would change every run's pixels."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    SPLIT = 4
    PIXELS = 5
    STORAGE = 6
    BALANCE = 7
    AUGMENTATION = 100  # and up, one per place in the list of augmentations


def random_bits(indices: np.ndarray, *, seed: int, epoch: int, operation: int, num_draws: int = 1) -> np.ndarray:
    """uint64 array [len(indices), num_draws] of uniform random bits."""
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, operation):
        key = _mix(key + _GAMMA + np.uint64(int(part) & 0xFFFFFFFFFFFFFFFF))
    per_image = _mix(key + _GAMMA * (np.asarray(indices).astype(np.uint64) + np.uint64(1)))
    draws = _GAMMA * np.arange(1, num_draws + 1, dtype=np.uint64)
    return _mix(per_image[:, None] + draws[None, :])


def uniforms(indices: np.ndarray, *, seed: int, epoch: int, operation: int, num_draws: int = 1) -> np.ndarray:
    """float64 array [len(indices), num_draws], uniform in [0, 1)."""
    bits = random_bits(indices, seed=seed, epoch=epoch, operation=operation, num_draws=num_draws)
    return (bits >> np.uint64(11)) * 2.0**-53


def occurrences(images: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Numbers (int64 [B]) that stand for copy 0, 1, 2 ... of an image in one epoch; copy 0 is the image's own number.

    Random numbers drawn for an occurrence differ from copy to copy, so an image that an epoch shows twice is cropped
    in two ways.
    """
    return np.asarray(images, dtype=np.int64) + (np.asarray(copies, dtype=np.int64) << _IMAGE_BITS)


def images_of(drawn: np.ndarray) -> np.ndarray:
    """The images, int64 [B], that occurrences are of."""
    return np.asarray(drawn) & ((1 << _IMAGE_BITS) - 1)


def copies_of(drawn: np.ndarray) -> np.ndarray:
    """The numbers of the copies, int64 [B], of occurrences."""
    return np.asarray(drawn) >> _IMAGE_BITS


def _mix(x: np.ndarray) -> np.ndarray:
    # splitmix64's finalizer; it relies on arrays wrapping around silently.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
