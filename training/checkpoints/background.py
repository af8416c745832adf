"""Writes while training goes on: a copy of the state in memory, and a thread that writes it."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_Move = tuple[Tensor, Tensor]  # target, source
_UNCHANGING = (bool, bytes, float, int, str, type(None))


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


class Copies:
    """Copies states into memory of its own, which the next copy uses again: new memory costs more than the copying.

    A copy is valid until the next one is made.
    """

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}
        self._moves: list[_Move] = []

    @torch.no_grad()
    def of(self, value: Any) -> Any:
        """A copy of nested mappings and lists, with tensors on the CPU; those that shared their memory still do."""
        before, self._buffers = self._buffers, {}
        try:
            with _one_thread():
                copied = self._copy(value, (), {}, before)
            _move_all(self._moves)
        finally:
            self._moves = []  # sources are the run's own tensors, which are not to be kept
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # a copy from a GPU to pinned memory does not wait for its end
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...], seen: dict[Any, Tensor], before: dict[Any, Tensor]) -> Any:
        if isinstance(value, DTensor):
            # Not by from_local, which would move this rank's part to the device of the mesh.
            return DTensor(self._copy(value._local_tensor, path, seen, before), value._spec, requires_grad=False)
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in seen or not value.numel():
                seen[key] = self._buffers[path] = self._filled(before.get(path), value)
            return seen[key]
        if isinstance(value, dict):
            copies = ((key, self._copy(item, (*path, key), seen, before)) for key, item in value.items())
            return OrderedDict(copies) if isinstance(value, OrderedDict) else dict(copies)
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, (*path, i), seen, before) for i, item in enumerate(value))
        return value if type(value) in _UNCHANGING else deepcopy(value)

    def _filled(self, buffer: Tensor | None, value: Tensor) -> Tensor:
        """`value` in memory of ours, that of `buffer` if it fits; on a CPU once `_moves` are done."""
        if buffer is None or _form(buffer) != _form(value):
            buffer = _memory_for(value)
        # Only memory without gaps has the strides of `_memory_for`'s.
        if value.device.type == "cpu" and value.stride() == buffer.stride() and not value.is_conj():
            self._moves.append((buffer, value))
            return buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For hundreds of copies: one thread nearly fills the memory's bandwidth, and several wait for each other after
    every tensor, which takes ten times as long where loaders or other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _move_all(moves: Sequence[_Move]) -> None:
    """Copy each source into its target, on this thread and another one, without waiting for each other in between.

    By the C library, which took three quarters of the time of torch's copies.
    """
    left = deque(sorted(moves, key=lambda move: move[1].nbytes))

    def work() -> None:
        with suppress(IndexError):
            while True:
                target, source = left.pop()  # the largest
                ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)

    other = threading.Thread(target=work, name="copy")
    other.start()
    try:
        work()
    finally:
        other.join()  # after Ctrl-C too: nothing may be written to this memory later


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _memory_for(value: Tensor) -> Tensor:
    """An uninitialized tensor on the CPU of the same shape and dtype, and of the same strides unless there are gaps."""
    if value.is_cuda:
        return torch.empty_like(value, device="cpu", pin_memory=True)  # which a GPU writes to twice as fast
    memory = torch.empty_like(value, device="cpu")
    if memory.stride() != value.stride() or not value.numel():
        return memory
    # numpy asks for huge pages, torch does not; without them the copy takes an eighth longer.
    numbers = torch.from_numpy(np.empty(value.numel() * value.element_size(), np.uint8)).view(value.dtype)
    return numbers.as_strided(value.shape, value.stride())
