from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from data.loading.normalize import Normalizer, normalize

MEAN, STD = (124.0, 116.0, 104.0), (58.0, 57.0, 56.0)


def test_it_is_torchvisions_on_the_scale_of_bytes():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8).to(memory_format=torch.channels_last)
    expected = functional.normalize(images / 255, [m / 255 for m in MEAN], [s / 255 for s in STD])
    result = normalize(images, mean=MEAN, std=STD)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    half = normalize(images, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_normalizer_leaves_labels_and_the_given_images_alone():
    images, labels = torch.full((2, 3, 4, 4), 9, dtype=torch.uint8), torch.tensor([1, 0])
    normalized, same = Normalizer(MEAN, STD)((images, labels))
    assert same is labels
    assert (images == 9).all()
    torch.testing.assert_close(normalized[0, :, 0, 0], (9 - torch.tensor(MEAN)) / torch.tensor(STD))


def test_normalizing_twice_and_dividing_by_nothing_are_refused():
    with pytest.raises(TypeError, match="normalize once"):
        normalize(torch.zeros(1, 3, 2, 2), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="must be above 0"):
        Normalizer(MEAN, (1, 0, 1))
