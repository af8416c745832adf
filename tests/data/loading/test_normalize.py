from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from data.loading.normalize import Normalizer, _in_two_passes, normalize

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


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_each_value_has_the_bits_of_the_formula_rounded_once(
    memory_format: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """All 256 in each channel: in half precision, what autocast would make of float32."""
    monkeypatch.setattr("data.loading.normalize._CHUNK_VALUES", 1000)  # of one, two and more images
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for shape in [(3, 16, 16), (3, 8, 16), (3, 7, 9)]:
        images = torch.arange(5 * 256, dtype=torch.uint8).view(5, 256)[:, : shape[1] * shape[2]]
        images = images.view(5, 1, *shape[1:]).repeat(1, 3, 1, 1).contiguous(memory_format=memory_format)
        formula = (images.float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        result = normalize(images, mean=mean, std=std, dtype=dtype)
        assert torch.equal(result, formula.to(dtype))
        assert result.is_contiguous(memory_format=memory_format)
        as_on_a_gpu = _in_two_passes(images, mean, std, dtype)
        assert torch.equal(as_on_a_gpu, formula.to(dtype))
        assert as_on_a_gpu.is_contiguous(memory_format=memory_format)


def test_slices_and_empty_batches_are_normalized_too():
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    result = normalize(images[::2, :, 1:, ::2], mean=MEAN, std=STD)
    assert torch.equal(result, normalize(images, mean=MEAN, std=STD)[::2, :, 1:, ::2])
    assert normalize(images[:0], mean=MEAN, std=STD).shape == (0, 3, 9, 9)


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
