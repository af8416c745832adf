"""Counts on a CPU what would make the host wait for a GPU.

`PretendGPU` is a pair of torch modes. Tensors that a training step would hold on a GPU are marked, and say that their
device is one; what is computed from them is marked too. So code that asks for a tensor's device takes its way for a
GPU, and each read of a marked tensor's value, and each copy that the host would wait for, is noted with the line that
caused it. The arithmetic is the CPU's. A device that torch finds out in C++ is the CPU too, so torch's clipping of a
norm, which moves it to its gradients' device, is noted without reason; tests/gpu has it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("privateuseone", 0)  # neither of the kinds for which code has ways of its own
WAIT, COPY = "wait", "copy"  # what stops the host until the device is done; what it starts and leaves
_OURS = tuple(f"{ROOT / layer}/" for layer in ("algos", "models", "data", "training"))

_READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave", "bincount", "allclose",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_MAKES_FROM_DATA = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
_TO_NUMBERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


@dataclass(frozen=True)
class Note:
    """One event: its kind, the operation, the step (from 0) and the function that caused it, as path:function."""

    kind: str
    operation: str
    step: int
    where: str


class PretendGPU:
    """Within `with PretendGPU() as gpu`, notes what the host would wait for. `gpu.step` is the step under way."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.collectives: list[Note] = []
        self.step = 0
        self._marked: dict[int, StorageWeakRef] = {}
        self._functions, self._operations = _Functions(self), _Operations(self)

    def __enter__(self) -> PretendGPU:
        self._functions.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)
        self._functions.__exit__(*error)

    def mark(self, tensors: Iterable[Any]) -> None:
        """Move the tensors to the device, which costs nothing and is not noted."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                # A weak reference keeps the storage's address from being given to another.
                reference = StorageWeakRef(_storage(tensor))
                self._marked[reference.cdata] = reference

    def holds(self, tensor: Any) -> bool:
        """Whether the tensor would be on the device."""
        return isinstance(tensor, Tensor) and _storage(tensor)._cdata in self._marked

    def count(self, kind: str, *, steps: Iterable[int]) -> list[Counter[str]]:
        """For each of `steps`: how often each place caused events of that kind."""
        return [Counter(n.where for n in self.notes if n.kind == kind and n.step == step) for step in steps]

    def note(self, kind: str, operation: str) -> None:
        (self.collectives if kind == "collective" else self.notes).append(Note(kind, operation, self.step, _place()))


class _Functions(TorchFunctionMode):
    """What Python calls: devices that are asked for or given, and copies that a CPU leaves out."""

    def __init__(self, gpu: PretendGPU) -> None:
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, dict(kwargs or {})
        first = args[0] if args else None
        on_device = gpu.holds(first)
        if func == Tensor.device.__get__ and on_device:
            return DEVICE
        if func in _TO_NUMBERS and on_device:
            gpu.note(WAIT, func.__name__)
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, args, kwargs)
        given = kwargs.get("device")
        if _is_pretended(given):
            kwargs["device"] = "cpu"
            if func in _MAKES_FROM_DATA and not gpu.holds(first):
                gpu.note(WAIT, f"{func.__name__}(device=...)")
        if func == Tensor.__deepcopy__ and on_device:
            return self._copied(args)
        result = func(*args, **kwargs)
        if _is_pretended(given) or (func == Tensor.new_tensor and on_device):
            gpu.mark(tree_leaves(result))
        return result

    def _copied(self, args: Any) -> Any:
        """A deep copy, whose storage torch makes by itself: it stays on the device."""
        with _unmarked(self._gpu, args[0]):
            result = Tensor.__deepcopy__(*args)
        self._gpu.mark([result])
        return result

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        gpu, tensor = self._gpu, args[0]
        given = [*args[1:], *kwargs.values()]
        to_device = any(_is_pretended(one) or gpu.holds(one) for one in given)
        to_host = func is Tensor.cpu or any(
            (isinstance(one, str) and one == "cpu") or (isinstance(one, torch.device) and one.type == "cpu")
            for one in given
        )
        plain = tuple("cpu" if _is_pretended(one) else one for one in args)
        named = {name: "cpu" if _is_pretended(one) else one for name, one in kwargs.items()}
        was_on_device = gpu.holds(tensor)
        result = func(*plain, **named)
        if to_device and not was_on_device:
            gpu.note(COPY if named.get("non_blocking") else WAIT, "host to device")
            result = result.clone() if result is tensor else result
            gpu.mark([result])
        if to_host and was_on_device:
            gpu.note(WAIT, "device to host")
            with _unmarked(gpu, tensor):
                return result.clone()
        return result


class _Operations(TorchDispatchMode):
    """What torch runs: the device of each result follows from those of its inputs."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        marked = [gpu.holds(one) for one in inputs]
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            gpu.note("collective", name)
            return func(*args, **kwargs)
        if name == "copy_" and any(marked) and not all(marked):
            return self._copied(func, args, kwargs)
        if any(marked):
            if name in _READS or (name in _INDEXING and _has_mask(args)):
                gpu.note(WAIT, name)
            elif name in _INDEXING and not all(marked):
                gpu.note(WAIT, f"{name} by a tensor of the host")
        result = func(*args, **kwargs)
        if any(marked):
            gpu.mark(tree_leaves(result))
            if func._schema.is_mutable:
                gpu.mark(one for one in tree_leaves(args) if isinstance(one, Tensor) and one.ndim)
        return result

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to.copy_(source)` between host and device: neither changes its place."""
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        direction = "device to host" if self._gpu.holds(args[1]) else "host to device"
        self._gpu.note(COPY if non_blocking else WAIT, direction)
        return func(*args, **kwargs)


def _is_pretended(one: Any) -> bool:
    return (isinstance(one, torch.device) and one.type == DEVICE.type) or one in (str(DEVICE), DEVICE.type)


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


@contextmanager
def _unmarked(gpu: PretendGPU, tensor: Tensor) -> Iterator[None]:
    key = _storage(tensor)._cdata
    reference = gpu._marked.pop(key)
    try:
        yield
    finally:
        gpu._marked[key] = reference


def _has_mask(args: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1]))


def _place() -> str:
    """The innermost function of this project or of Composer on the stack, and what it called outside of them."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_name}"
        if "/composer/" in path:
            return f"composer/{path.rpartition('/composer/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
