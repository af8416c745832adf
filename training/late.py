"""Numbers that the device has not computed yet: copied to the host in the background, and read when they are there.

On a GPU the host only lists what is to be done, and stays ahead of it. Whoever reads a loss right after a step waits
until the GPU has finished it; then the GPU waits for the host's next list. A `LateValue` starts the copy and goes on,
and a `LateQueue` reads it two steps later. On a CPU the value is there at once, and nothing is late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

STEPS_LATE = 2  # the GPU then has a whole step to do while the host reads
_LATE_DEVICES = {"cuda"}  # whose copies to pinned memory go on by themselves

Item = TypeVar("Item")


class LateValue:
    """The value of a tensor as it is now, divided by `divisor`; float() and `values` wait for it where they must.

    tensor: one element for float(), or a vector for `values`.
    """

    def __init__(self, tensor: Tensor, *, divisor: int = 1) -> None:
        self._divisor = divisor
        self._event: Any = None
        self._values: list[float] | None = None
        tensor = tensor.detach()
        if tensor.device.type in _LATE_DEVICES:
            tensor, self._event = _start_copy(tensor)
        else:
            self._values = self._read(tensor)
        self._host: Tensor = tensor

    @property
    def is_known(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._values is not None

    @property
    def values(self) -> list[float]:
        """The elements."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = self._read(self._host)
            self._event = None
        return self._values

    def __float__(self) -> float:
        (value,) = self.values
        return value

    def _read(self, tensor: Tensor) -> list[float]:
        if tensor.numel() == 1:
            return [tensor.item() / self._divisor]
        return [value / self._divisor for value in tensor.flatten().tolist()]


Number = LateValue | float


class LateQueue(Generic[Item]):
    """Items that wait for their late values, in their order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Item, bool]] = deque()

    def put(self, item: Item, *values: Any) -> None:
        """Add an item. values: what it waits for; those that are no `LateValue` are there already."""
        # Of now, not of when it is asked: others read the same values, and not on every rank at the same step.
        known = all(value.is_known for value in values if isinstance(value, LateValue))
        self._waiting.append((item, known))

    def take_due(self) -> Iterator[Item]:
        """Removes and yields the items whose values were there from the start, and those STEPS_LATE items old."""
        while self._waiting and (self._waiting[0][1] or len(self._waiting) > STEPS_LATE):
            yield self._waiting.popleft()[0]

    def take_all(self) -> Iterator[Item]:
        """Removes and yields all items; reading their values waits for the device."""
        while self._waiting:
            yield self._waiting.popleft()[0]

    def clear(self) -> None:
        """Drop all items."""
        self._waiting.clear()


def late(value: Any) -> Number | None:
    """A tensor's value, late; numbers, late values and None are what they are."""
    return LateValue(value) if isinstance(value, Tensor) else value


def _start_copy(tensor: Tensor) -> tuple[Tensor, Any]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    host.copy_(tensor, non_blocking=True)
    return host, _end_of_work(tensor.device)


def _end_of_work(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
