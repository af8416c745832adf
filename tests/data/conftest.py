"""Small data shared by every test here, written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import digits, write_beton
from data.sources import ArraySource


@pytest.fixture(scope="session")
def digits_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beton(digits(), tmp_path_factory.mktemp("digits") / "digits.beton", progress=False)


@pytest.fixture(scope="session")
def photos() -> ArraySource:
    """30 smooth images of one size, 150x200 px, in 3 classes."""
    return smooth_images(30, height=150, width=200)


@pytest.fixture(scope="session")
def photos_jpg(photos: ArraySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photos.beton"
    return write_beton(photos, path, write_mode="jpg", jpeg_quality=95, progress=False)


@pytest.fixture(scope="session")
def photos_raw(photos: ArraySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beton(photos, tmp_path_factory.mktemp("photos") / "photos.beton", progress=False)


def smooth_images(num_images: int, *, height: int, width: int) -> ArraySource:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    down, across = rng.uniform(0.3, 1, (2, num_images, 1, 1, 3))
    images = 128 + 100 * np.sin(2 * np.pi * (rows[..., None] * down + columns[..., None] * across))
    labels = np.arange(num_images) % 3
    return ArraySource(images.astype(np.uint8), labels, class_names=("ant", "bee", "cat"), name="photos")
