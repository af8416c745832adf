"""Imports Composer without the packages that no recipe uses, which take two fifths of its import.

torchmetrics imports transformers, scipy and matplotlib if they are installed, for text and audio metrics and to plot
metrics. Composer imports transformers for an algorithm that changes BERT, and mcli for MosaicML's platform.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module, util
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_METRICS, _BERTS, _PLATFORM = "torchmetrics", "composer.algorithms.gated_linear_units.gated_linear_units", "mcli"
# torchmetrics works without them, except for the metrics and plots that need them.
_ABSENT_FOR_METRICS = frozenset({"matplotlib", "scipy", "transformers"})
_REQUIREMENTS = "lightning_utilities.core.imports"  # where torchmetrics checks what is installed


def import_lean() -> None:
    """Make Composer's import skip what no recipe uses. Modules that are already imported stay as they are.

    During its import, torchmetrics finds `_ABSENT_FOR_METRICS` missing. Composer's algorithm for BERT, which recipes
    cannot use, finds transformers missing. All other code can import them: Hugging Face's models and curves.png do so
    when they need them. mcli is imported on first use.

    This is for run.py's own process: in it, torchmetrics has no text metrics and plots nothing.
    """
    if not any(isinstance(finder, _LeanFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LeanFinder())  # pyright: ignore[reportArgumentType]


class _LeanFinder:
    """Finds the three modules as Python does, and replaces their loaders."""

    def __init__(self) -> None:
        self._platform_is_wanted = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _WITHOUT:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _LoaderWithin(spec.loader, _WITHOUT[name])  # pyright: ignore[reportAttributeAccessIssue]
            return spec
        if self._platform_is_wanted:
            return None
        if name.startswith(f"{_PLATFORM}."):
            self.import_platform()
            return util.find_spec(name)
        if name == _PLATFORM and PathFinder.find_spec(name, path, target) is not None:
            return ModuleSpec(name, _LateLoader(self))  # pyright: ignore[reportArgumentType]
        return None

    def import_platform(self) -> ModuleType:
        """Replace the stand-in with mcli itself."""
        if not self._platform_is_wanted:
            self._platform_is_wanted = True
            del sys.modules[_PLATFORM]
        return import_module(_PLATFORM)


class _LoaderWithin:
    """Loads as `loader` does, inside a context."""

    def __init__(self, loader: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._loader, self._context = loader, context

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader  # pyright: ignore[reportOptionalMemberAccess]
        with self._context():
            self._loader.exec_module(module)


@contextlib.contextmanager
def _told_absent() -> Iterator[None]:
    """Inside the context, `_REQUIREMENTS` reports the packages of `_ABSENT_FOR_METRICS` as missing."""
    requirements: Any = import_module(_REQUIREMENTS)
    available, cache = requirements.package_available, requirements.RequirementCache

    class WithoutSome(cache):
        def __bool__(self) -> bool:
            name, *_ = re.split(r"[^\w-]", self.requirement or self.module)
            return name not in _ABSENT_FOR_METRICS and super().__bool__()

    requirements.package_available = lambda name: name not in _ABSENT_FOR_METRICS and available(name)
    requirements.RequirementCache = WithoutSome
    try:
        yield
    finally:
        requirements.package_available, requirements.RequirementCache = available, cache


@contextlib.contextmanager
def _no_transformers() -> Iterator[None]:
    """Inside the context, transformers cannot be imported, unless it already is."""
    if "transformers" in sys.modules:
        yield
        return
    sys.modules["transformers"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["transformers"]


_WITHOUT = {_METRICS: _told_absent, _BERTS: _no_transformers}


class _LateLoader:
    def __init__(self, finder: _LeanFinder) -> None:
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Late(spec.name, self._finder)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run before the first use."""


class _Late(ModuleType):
    """Stands in for mcli, which is imported on first use."""

    def __init__(self, name: str, finder: _LeanFinder) -> None:
        super().__init__(name)
        self.__path__ = []  # so that importing a submodule reaches the finder
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._finder.import_platform(), name)
