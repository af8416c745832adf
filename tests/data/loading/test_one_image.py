"""One image as the torch loader serves it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data import TorchLoader, prepare_image, read_image
from data.sources import ArraySource


@pytest.mark.parametrize(("height", "width", "crop_ratio"), [(40, 60, 0.875), (31, 17, 1.0)])
def test_it_is_what_the_loader_gives(height: int, width: int, crop_ratio: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    source = ArraySource(images, np.arange(3), class_names=("a", "b", "c"), name="noise")
    loader = TorchLoader(
        source, per_device_batch_size=3, image_size=24, train=False, num_workers=0, eval_crop_ratio=crop_ratio
    )
    (served, _), = loader  # fmt: skip
    for image, expected in zip(images, served, strict=True):
        assert torch.equal(prepare_image(image, image_size=24, crop_ratio=crop_ratio), expected)


def test_a_file_is_read_upright_in_rgb() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(file.getvalue()), np.rot90(pixels, -1))
