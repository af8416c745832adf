"""The installed package: `brisk.data`, `brisk.models`, and `brisk.algos`, which is an alias of `algos`.

In a checkout the same code is `data`, `models` and `algos`. Installed, the first two would collide with folders that
nearly every project has, so they exist only here; users import `algos`, so it stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ALGOS = f"{__name__}.algos"


class _SecondName:
    """Imports `brisk.algos` and its submodules as those of `algos`, so that each class exists once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == _ALGOS or name.startswith(f"{_ALGOS}.") else None  # pyright: ignore

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(spec.name.removeprefix(f"{__name__}."))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just replaced the module's own specification with the alias's.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _SecondName())  # pyright: ignore[reportArgumentType]


def __getattr__(name: str) -> Any:
    if name not in ("algos", "data", "models"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: algos, data, models")
    return import_module(f"{__name__}.{name}")
