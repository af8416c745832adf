"""A recipe's file as plain data, with the command line's overrides applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.recipe.schema import RecipeError

_NAMED = ("model", "optimizer", "data", "data.source")  # an override of one of them can bring a bare name


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file as plain data. Raises RecipeError."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        near = sorted(str(other) for other in Path("yamls").glob("*.yaml"))
        raise RecipeError("", f"no such file; recipes here: {', '.join(near) or 'none'}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError("", _one_line(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError("", "is not a mapping of keys to values")
    return raw  # pyright: ignore


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `key=value` of `overrides` applied in turn. Raises RecipeError."""
    seen: set[str] = set()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise RecipeError(override, "an override has the form key=value, for example algorithms.sam=null")
        if key in seen:
            raise RecipeError(key, "given twice on the command line")
        seen.add(key)
    try:
        merged = OmegaConf.create(with_names(raw))
        for override in overrides:  # in turn: algorithms=null algorithms.mixup.alpha=0.1 leaves only MixUp on
            merged.merge_with(OmegaConf.from_dotlist([override]))
            if override.partition("=")[0] in _NAMED:
                merged = OmegaConf.create(with_names(OmegaConf.to_container(merged)))
        return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError("", _one_line(error)) from None


def with_names(raw: Any) -> Any:
    """`model: resnet18` written out as `model: {name: resnet18}`, so that an override adds a setting to either."""
    if not isinstance(raw, dict):
        return raw
    named = {key: {"name": raw[key]} for key in ("model", "optimizer") if isinstance(raw.get(key), str)}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("source"), str):
        named["data"] = {**data, "source": {"name": data["source"]}}
    return {**raw, **named}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
