"""Copies batches to the GPU on a separate stream while the previous step is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch

Batch = tuple[torch.Tensor, torch.Tensor]


def to_device(
    batches: Iterable[Batch], device: torch.device, *, release: Callable[[torch.Tensor], None] = lambda images: None
) -> Generator[Batch, None, None]:
    """The same batches on `device`, each copied while the consumer works on the previous one.

    On CUDA the copies run on a side stream, so they neither wait for the step nor delay it; the memory format is kept.
    The images should be in pinned memory (see `HostBuffers`), or the copy waits for the host. `release` gets a batch's
    images on the host once they are copied, a step later and before the next batch is asked for.
    """
    if device.type != "cuda":
        yield from (_copied(batch, device) for batch in batches)
        return
    stream: Any = torch.cuda.Stream(device)  # torch's stubs lack streams and events without CUDA
    ahead: tuple[Batch, Any] | None = None
    for batch in batches:
        copied: Any = torch.cuda.Event()
        with torch.cuda.stream(stream):
            begun = _copied(batch, device), copied
        copied.record(stream)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = begun
        copied.synchronize()  # the consumer has issued a step meanwhile, so there is nothing left to wait for
        release(batch[0])
    if ahead is not None:
        yield _arrived(*ahead)


class HostBuffers:
    """Memory on the host for the batches of one pass: pinned and used again for a GPU, else each batch's own.

    Pinning pages takes the driver milliseconds and stops the GPU, so a pass does it only until as many buffers exist as
    are in use at a time. To be used by one thread.

    Args:
        device: that the batches are for.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._least_bytes = 0
        self._free: list[torch.Tensor] = []
        self._taken: dict[int, torch.Tensor] = {}

    def reserve(self, batch_bytes: int) -> None:
        """Make each buffer at least so large from now on: batches may differ, and each should fit into any."""
        self._least_bytes = batch_bytes

    def take(self, num_images: int, image_size: int) -> tuple[torch.Tensor, np.ndarray]:
        """Memory for a batch, viewed as the tensor [B, 3, S, S] to return and as the array [B, S, S, 3] to fill."""
        if not self._pinned:
            return empty_images(num_images, image_size)
        num_bytes = num_images * image_size * image_size * 3
        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        buffer = fitting[0] if fitting else _pinned_bytes(max(num_bytes, self._least_bytes))
        self._free = [other for other in self._free if other is not buffer]
        self._taken[buffer.data_ptr()] = buffer
        images = buffer[:num_bytes].view(num_images, image_size, image_size, 3)
        return images.permute(0, 3, 1, 2), images.numpy()

    def release(self, images: torch.Tensor) -> None:
        """Nobody reads these images any more: the next `take` may use their memory, if it is of these buffers."""
        buffer = self._taken.pop(images.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)


def empty_images(num_images: int, image_size: int) -> tuple[torch.Tensor, np.ndarray]:
    """New memory for a batch, viewed as the tensor [B, 3, S, S] to return and as the array [B, S, S, 3] to fill."""
    shape = (num_images, image_size, image_size, 3)
    images = torch.from_numpy(np.empty(shape, dtype=np.uint8))  # numpy requests huge pages, torch does not
    return images.permute(0, 3, 1, 2), images.numpy()


def _pinned_bytes(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _copied(batch: Batch, device: torch.device) -> Batch:
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _arrived(batch: Batch, copied: Any) -> Batch:
    # The step waits for this copy only, and the side stream cannot reuse the memory while the step uses it.
    step = torch.cuda.current_stream(batch[0].device)
    copied.wait(step)
    for part in batch:
        part.record_stream(step)
    return batch
