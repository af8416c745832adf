"""Composer without what it imports for others: two fifths of its import, and nothing that a recipe uses.

torchmetrics imports transformers, scipy and matplotlib where they are installed, for metrics of texts and sounds and to
plot metrics. Composer imports transformers for an algorithm that changes BERT, and mcli for MosaicML's platform.
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
# torchmetrics can do without them, less the metrics and plots that need them.
_ABSENT_FOR_METRICS = frozenset({"matplotlib", "scipy", "transformers"})
_REQUIREMENTS = "lightning_utilities.core.imports"  # where torchmetrics asks what is installed


def import_lean() -> None:
    """Have Composer's import leave out what no recipe uses. What is imported already stays as it is.

    torchmetrics, while it is imported, finds `_ABSENT_FOR_METRICS` absent; Composer's algorithm for BERT, which recipes
    cannot have, finds transformers absent. Nobody else does: Hugging Face's models and curves.png import them when they
    need them. mcli is imported when something of it is used.

    This is for run.py's own process: in it, torchmetrics has no metrics of texts and plots nothing.
    """
    if not any(isinstance(finder, _LeanFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LeanFinder())  # pyright: ignore[reportArgumentType]


class _LeanFinder:
    """Finds the three modules where Python does, and has them loaded in another way."""

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
        """mcli itself, in its stand-in's place."""
        if not self._platform_is_wanted:
            self._platform_is_wanted = True
            del sys.modules[_PLATFORM]
        return import_module(_PLATFORM)


class _LoaderWithin:
    """Loads as `loader` does, within a context."""

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
    """Within, `_REQUIREMENTS` tells whoever imports from it that the packages of `_ABSENT_FOR_METRICS` are absent."""
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
    """Within, transformers cannot be imported, unless it is already."""
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
        """Nothing to run until something of it is used."""


class _Late(ModuleType):
    """In place of mcli, which is imported when something of it is used."""

    def __init__(self, name: str, finder: _LeanFinder) -> None:
        super().__init__(name)
        self.__path__ = []  # so that a module within it is looked for, which the finder sees
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._finder.import_platform(), name)
