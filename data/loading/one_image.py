"""One image of any size -> what a loader serves of it in evaluation."""

from __future__ import annotations

import numpy as np
import torch

from ..decoding.crops import center_crops
from ..sources.image_file import open_image, rgb_pixels


def read_image(data: bytes) -> np.ndarray:
    """The contents of an image file as RGB, uint8 [height, width, 3], upright.

    Raises:
        UnusableImage: not an image, a damaged one, or one that costs too much to decode; see `open_image`.
    """
    return rgb_pixels(open_image(data))


def prepare_image(image: np.ndarray, *, image_size: int, crop_ratio: float) -> torch.Tensor:
    """The centered square of an image, resized with antialiasing; the same pixels as `TorchLoader`'s in evaluation.

    Args:
        image: uint8 [height, width, 3].
        image_size: of the result, in px.
        crop_ratio: side of the square as a share of the image's shorter side, in (0, 1].

    Returns:
        uint8 [3, image_size, image_size].
    """
    from torchvision.transforms.v2 import functional

    height, width = image.shape[:2]
    top, left, side_y, side_x, _ = center_crops(np.array([height]), np.array([width]), crop_ratio=crop_ratio)[
        0
    ].tolist()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return functional.resized_crop(pixels, top, left, side_y, side_x, [image_size, image_size], antialias=True)
