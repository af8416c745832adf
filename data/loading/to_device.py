"""Copies batches to the GPU on a separate stream while the previous step is computed."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


def to_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches on `device`, each copied while the consumer works on the previous one.

    On CUDA the copies run on a side stream, so they neither wait for the step nor delay it; the memory format is kept.
    The images should be in pinned memory (see `empty_images`), or the copy waits for the host.
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
    if ahead is not None:
        yield _arrived(*ahead)


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
