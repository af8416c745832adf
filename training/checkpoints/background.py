"""Writes while training goes on: a copy of the state in memory, and a thread that writes it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor


class Background:
    """Does one thing at a time on a thread. What it raised is raised by the next `start` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do `work`, after what is under way."""
        self.wait()
        # Not a daemon: the interpreter waits for it, so that an exit cuts no file off.
        self._thread = threading.Thread(target=self._do, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


def in_memory(value: Any, seen: dict[Any, Tensor] | None = None) -> Any:
    """A copy of nested mappings and lists, with tensors on the CPU; those that shared their memory still do."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if key not in seen or not value.numel():
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        copies = ((key, in_memory(item, seen)) for key, item in value.items())
        return OrderedDict(copies) if isinstance(value, OrderedDict) else dict(copies)
    if type(value) in (list, tuple):
        return type(value)(in_memory(item, seen) for item in value)
    return deepcopy(value)
