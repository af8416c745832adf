"""Changes a layer by giving it a subclass of its own class, so that parameters, names, hooks and optimizers stay."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn


class Changed(nn.Module):
    """First base of every class that `change_class` makes; the layer's former class is the second.

    named: how the names of these classes begin.
    """

    named: ClassVar[str] = "Changed"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes created at run time cannot be found by name: rebuild this one from the layer's former class. Other
        # libraries' subclasses of it (for parametrization, sharding) copy themselves.
        first, *others = type(self).__bases__
        if "named" not in vars(first):
            return super().__reduce_ex__(protocol)
        return _rebuild, (first, *others), self.__dict__.copy()


def change_class(layer: Any, first: type[Changed]) -> None:
    """Make `layer`, in place, one of a class whose bases are `first` and the layer's class."""
    layer.__class__ = _joined(first, type(layer))


@functools.cache
def _joined(first: type[Changed], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{first.named}{cls.__name__}", (first, cls), {"__module__": first.__module__})


def _rebuild(first: type[Changed], cls: type[nn.Module]) -> nn.Module:
    joined = _joined(first, cls)
    return joined.__new__(joined)
