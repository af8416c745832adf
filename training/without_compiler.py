"""Spares a process that never compiles the import of torch's compiler, which takes as long as the rest of torch."""

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
_ALGEBRA = "sympy"  # half of the compiler's import time
_MODULES = (_COMPILER, f"{_COMPILER}.utils", _SHAPES, "torch.utils.checkpoint", _ALGEBRA)
# What these do when nothing is compiled: every size is a number, every condition on it is true or false, and nothing is
# a sympy expression.
_ANSWERS: dict[tuple[str, str], Callable[..., Any]] = {
    (_COMPILER, "disable"): lambda function, *args, **kwargs: function,
    (_SHAPES, "_advise_is_size"): lambda size: None,
    (_SHAPES, "expect_true"): lambda condition, *args, **kwargs: condition,
    (_SHAPES, "guard_or_false"): lambda condition: condition,
    (_SHAPES, "guard_or_true"): lambda condition: condition,
    (_SHAPES, "guard_size_oblivious"): lambda condition: condition,
    (_SHAPES, "is_nested_int"): lambda size: False,
    (_SHAPES, "statically_known_true"): lambda condition: condition,
    (_SHAPES, "sym_and"): lambda *conditions: all(conditions),
    (_SHAPES, "sym_eq"): lambda left, right: left == right,
    (_SHAPES, "sym_or"): lambda *conditions: any(conditions),
    (_ALGEBRA, "Basic"): type("Basic", (), {}),
}


def leave_out_compiler() -> None:
    """Replace torch's compiler with stand-ins, unless it is already imported.

    torch calls the compiler to exclude many functions from compilation at their first call and to check sizes, and uses
    sympy to recognize expressions; torchvision imports the compiler for two functions that only training calls. The
    stand-ins handle torch's calls (`_ANSWERS`). Any other use restores the real modules. Functions excluded until then
    would be compiled like others, so this is only for a process that plans and exits.
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
    """Stands in for a module: its functions import the real one when they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that importing a submodule reaches _MakeWay

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) in _ANSWERS:
            return _ANSWERS[self.__name__, name]
        if self.__name__ == _ALGEBRA:  # its attributes are classes, which torch inherits from
            _make_way()
            return getattr(import_module(_ALGEBRA), name)

        def of_the_module(*args: Any, **kwargs: Any) -> Any:
            _make_way()
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return of_the_module


class _MakeWay:
    """Restores the real modules when a submodule of the compiler or of sympy is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith((f"{_COMPILER}.", f"{_ALGEBRA}.")):
            return None
        _make_way()
        return find_spec(name)
