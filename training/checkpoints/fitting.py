"""Refuses a checkpoint of another network or optimizer before anything of it is loaded.

Composer 0.32.1 warns of an optimizer whose state is not there and trains on without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from models.data_only import is_archive
from training.recipe import RecipeError

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


class RefuseAnother(Callback):
    """Compares the file `path` with the run when the Trainer is about to load it: names, shapes, optimizer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def before_load(self, state: State, logger: Logger) -> None:
        """Raises RecipeError unless every weight is there, none is over, and the optimizer's state is there too."""
        # What the file says; the tensors' values stay on disk.
        saved: Any = torch.load(self._path, map_location="cpu", mmap=is_archive(self._path), weights_only=False)
        reason = self._difference(saved.get("state") if isinstance(saved, dict) else None, state)
        if reason is not None:
            raise RecipeError(
                "load",
                f"is {self._path}, which {reason}. Continue with the recipe that it was written by, or start from its "
                "weights alone: python -m training.checkpoints.export, then model.weights",
            )

    def _difference(self, saved: Any, state: State) -> str | None:
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
            return "holds no state of a run"
        theirs = {
            _plain(str(name)): tuple(value.shape) for name, value in saved["model"].items() if hasattr(value, "shape")
        }
        ours = {_plain(name): tuple(value.shape) for name, value in state.model.state_dict().items()}
        if missing := _first(name for name in ours if name not in theirs):
            return f"lacks the weights {missing}"
        if over := _first(name for name in theirs if name not in ours):
            return f"has weights that this network does not: {over}"
        if other := _first(name for name in ours if ours[name] != theirs[name]):
            name = other.partition(" ")[0]
            return f"has weights of other shapes: {other}, {list(theirs[name])} there and {list(ours[name])} here"
        needed, found = [type(one).__qualname__ for one in state.optimizers], saved.get("optimizers")
        found = found if isinstance(found, dict) else {}
        if any(not found.get(name) for name in needed):
            return (
                f"lacks the state of the optimizer, {', '.join(needed)} (it has {', '.join(map(str, found)) or 'none'})"
            )
        return None


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _first(names: Iterable[str]) -> str:
    found = list(names)
    return "" if not found else found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
