"""Passes whose batches differ in size: in every loader the same images, each at the size of its batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from algos.framework.protocols import MixedSizesLoader
from data import FFCVLoader, Loader, TorchLoader, digits
from data.loading.to_device import HostBuffers

pytestmark = pytest.mark.timeout(60)

SHAPES = [(16, 100), (8, 300), (12, 7), (16, 200), (8, 300), (12, 400)]  # 1,307 of 1,438 images
Make = Callable[..., Loader]


@pytest.fixture(params=["ffcv", "torch"])
def make(request: pytest.FixtureRequest, digits_beton: Path) -> Make:
    def loader(**settings) -> Loader:
        settings = {"per_device_batch_size": 50, "image_size": 20, "train": True, "num_workers": 0} | settings
        return FFCVLoader(digits_beton, **settings) if request.param == "ffcv" else TorchLoader(digits(), **settings)

    return loader


def batches(loader: Loader, *, epoch: int = 0, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_position(epoch, first)
    return list(loader)


def test_every_image_is_what_it_is_in_a_pass_at_the_size_of_its_batch(make: Make):
    loader = make()
    assert isinstance(loader, MixedSizesLoader)
    loader.set_batch_shapes(SHAPES)
    assert len(loader) == len(SHAPES)
    mixed = batches(loader, epoch=3)
    assert [(images.shape[-1], len(labels)) for images, labels in mixed] == SHAPES
    whole = make(per_device_batch_size=1, drop_last=False)
    begin = 0
    for number, ((size, count), (images, labels)) in enumerate(zip(SHAPES, mixed, strict=True)):
        whole.set_image_size(size)
        whole.set_batch_size(1438)
        ((same_images, same_labels),) = batches(whole, epoch=3)
        assert torch.equal(images, same_images[begin : begin + count])
        assert torch.equal(labels, same_labels[begin : begin + count])
        np.testing.assert_array_equal(loader.image_indices(3, number), whole.image_indices(3, 0)[begin : begin + count])
        begin += count


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_and_a_resumption_change_nothing(make: Make, num_workers: int):
    alone, helped = make(), make(num_workers=num_workers)
    for loader in (alone, helped):
        loader.set_batch_shapes(SHAPES)
    for one, other in zip(batches(alone, epoch=1)[2:], batches(helped, epoch=1, first=2), strict=True):
        assert all(torch.equal(part, same) for part, same in zip(one, other, strict=True))


def test_ranks_together_have_the_batches_of_one_process(make: Make):
    alone = make()
    alone.set_batch_shapes([(size, 2 * count) for size, count in SHAPES[2:4]])
    ranks = [make(rank=rank, world_size=2) for rank in (0, 1)]
    for loader in ranks:
        loader.set_batch_shapes(SHAPES[2:4])
    for whole, *parts in zip(batches(alone), *map(batches, ranks), strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in parts]))


@pytest.mark.parametrize(("drop_last", "expected"), [(True, [700, 700]), (False, [700, 700, 38])])
def test_a_last_batch_that_asks_for_more_than_is_left(make: Make, drop_last: bool, expected: list[int]):
    loader = make(drop_last=drop_last)
    loader.set_batch_shapes([(8, 700)] * 3)
    assert len(loader) == len(expected)
    assert [len(labels) for _, labels in batches(loader)] == expected


def test_it_ends_with_the_pass_for_which_other_sizes_are_set(make: Make):
    loader = make()
    loader.set_batch_shapes(SHAPES)
    assert loader.batch_size == 50  # what a stage without a batch size goes back to
    loader.set_batch_shapes(None)
    assert (len(loader), next(iter(loader))[0].shape[-1]) == (28, 20)
    for ends in (lambda: loader.set_image_size(16), lambda: loader.set_batch_size(50)):
        loader.set_batch_shapes(SHAPES)
        ends()
        assert len(loader) == 28


def test_what_cannot_be_a_pass_is_refused(make: Make):
    loader = make()
    for shapes, said in (
        ([], "images make no batch of these"),
        ([(16, 2000)], r"batch shapes \[\(16, 2000\)\]: 1438 images make no batch of these on 1 devices"),
        ([(16, 10), (0, 10)], "image size 0: give a whole number of px, at least 1"),
        ([(16, 10), (16, 1.5)], "per-device batch size 1.5: give a whole number of images"),
    ):
        with pytest.raises(ValueError, match=said):
            loader.set_batch_shapes(shapes)
    assert len(loader) == 28
    with pytest.raises(ValueError, match="batch shapes are for training"):
        make(train=False).set_batch_shapes(SHAPES)


def test_a_pinned_buffer_takes_any_batch_of_the_pass(monkeypatch: pytest.MonkeyPatch):
    pinned: list[int] = []

    def pin(num_bytes: int) -> torch.Tensor:
        pinned.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr("data.loading.to_device._pinned_bytes", pin)
    buffers = HostBuffers(torch.device("cuda"))
    buffers.reserve(3 * 200 * 16**2)
    for size, count in SHAPES[:4] * 2:
        images, memory = buffers.take(count, size)
        assert memory.shape == (count, size, size, 3)
        buffers.release(images)
    assert pinned == [3 * 200 * 16**2]
