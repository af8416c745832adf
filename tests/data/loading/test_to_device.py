"""The way to a GPU, with a pretended one whose copies happen as late as they may."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data import FFCVLoader
from data.loading import to_device
from data.loading.to_device import HostBuffers

pytestmark = pytest.mark.timeout(60)

CUDA = torch.device("cuda")


class LateStream:
    """Its copies are queued, and done in order when somebody waits for an event behind them."""

    queue: list[Callable[[], Any]]

    def __init__(self, device: torch.device) -> None:
        LateStream.queue = []

    @staticmethod
    def copied(batch: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        if device.type == "cpu":
            return batch
        arrived = tuple(torch.empty_like(part) for part in batch)
        LateStream.queue += [partial(to.copy_, part) for to, part in zip(arrived, batch, strict=True)]
        return arrived


class LateEvent:
    def record(self, stream: LateStream) -> None:
        self.queue = stream.queue
        self.last = stream.queue[-1]

    def wait(self, step: None = None) -> None:
        while self.last in self.queue:
            self.queue.pop(0)()

    synchronize = wait


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends a GPU; the sizes in bytes of the pinned buffers that were allocated."""
    sizes: list[int] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(to_device, "_pinned_bytes", allocate)
    monkeypatch.setattr(to_device, "_copied", LateStream.copied)
    for name, stand_in in {
        "Stream": LateStream, "Event": LateEvent, "stream": nullcontext, "current_stream": lambda device: None
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return sizes


@pytest.mark.parametrize(("batches_ahead", "num_workers"), [(1, 1), (2, 3), (5, 2)])
def test_pinned_memory_is_allocated_once_and_never_overwritten_early(
    digits_beton: Path, pinned: list[int], batches_ahead: int, num_workers: int
):
    settings = {"per_device_batch_size": 24, "image_size": 20, "train": True, "drop_last": False}
    settings |= {"num_workers": num_workers, "batches_ahead": batches_ahead}
    expected = list(FFCVLoader(digits_beton, **settings))
    kept = list(FFCVLoader(digits_beton, device=CUDA, **settings))
    assert len(kept) == len(expected) == 60
    for (images, labels), (right, right_labels) in zip(kept, expected, strict=True):
        assert torch.equal(images, right)
        assert torch.equal(labels, right_labels)
    # Those that wait, that are decoded, that are copied and that the next part belongs to; not one a batch.
    assert 2 <= len(pinned) <= batches_ahead + 3
    assert set(pinned) == {24 * 20 * 20 * 3}


def test_a_pass_of_smaller_batches_after_a_larger_one(pinned: list[int]):
    buffers = HostBuffers(CUDA)
    (first, memory), (second, _) = buffers.take(4, 10), buffers.take(3, 10)
    assert first.shape == (4, 3, 10, 10)
    assert first.is_contiguous(memory_format=torch.channels_last)
    memory[:] = 7
    assert bool((first == 7).all())
    buffers.release(first)
    buffers.release(torch.zeros(4, 3, 10, 10))  # of somebody else
    third, _ = buffers.take(2, 11)
    assert third.data_ptr() == first.data_ptr()
    assert second.data_ptr() != buffers.take(5, 10)[0].data_ptr()
    assert pinned == [1200, 900, 1500]


def test_without_a_gpu_each_batch_has_its_own_memory():
    buffers = HostBuffers(torch.device("cpu"))
    first, _ = buffers.take(4, 10)
    buffers.release(first)
    assert buffers.take(4, 10)[0].data_ptr() != first.data_ptr()
