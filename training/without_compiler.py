"""A process that never compiles does without torch's compiler, which takes as long to import as the rest of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_ALGEBRA = "sympy"  # half of what the compiler's import takes
_MODULES = (_COMPILER, f"{_COMPILER}.utils", _SHAPES, "torch.utils.checkpoint", _ALGEBRA)
# What these do where nothing is compiled: every size is a number, what is asked of it is true or false, and nothing is
# one of sympy's expressions.
_ANSWERS: dict[tuple[str, str], Callable[..., Any]] = {
    (_COMPILER, "disable"): lambda function, *args, **kwargs: function,
    (_SHAPES, "_advise_is_size"): lambda size: None,
    (_SHAPES, "expect_true"): lambda condition, *args, **kwargs: condition,
    (_SHAPES, "guard_size_oblivious"): lambda condition: condition,
    (_SHAPES, "is_nested_int"): lambda size: False,
    (_ALGEBRA, "Basic"): type("Basic", (), {}),
}


def leave_out_compiler() -> None:
    """Put stand-ins in place of torch's compiler; nothing where it is imported already.

    torch asks the compiler to leave many of its functions alone at their first call, and whether sizes are as they
    should be, and sympy what is an expression; torchvision imports the compiler for two functions that only training
    calls. The stand-ins answer the former (`_ANSWERS`). At whatever else is asked of them they make way for what they
    stand for. Functions left alone by then would be compiled like others: this is for a process that plans and ends.
    """
    if _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _MakeWay())  # pyright: ignore[reportArgumentType]
        sys.modules.update({name: _StandIn(name) for name in _MODULES if name not in sys.modules})


def _make_way() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _MakeWay)]
    for name in _MODULES:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(ModuleType):
    """In place of a module: its functions import it when they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that a module within it is looked for, which _MakeWay sees

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) in _ANSWERS:
            return _ANSWERS[self.__name__, name]
        if self.__name__ == _ALGEBRA:  # classes, which torch inherits from
            _make_way()
            return getattr(import_module(_ALGEBRA), name)

        def of_the_module(*args: Any, **kwargs: Any) -> Any:
            _make_way()
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return of_the_module


class _MakeWay:
    """Sees the import of a module within the compiler or sympy, which needs them themselves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith((f"{_COMPILER}.", f"{_ALGEBRA}.")):
            return None
        _make_way()
        return find_spec(name)
