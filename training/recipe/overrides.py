"""A recipe's file as plain data, with the command line's overrides applied."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.recipe.schema import RecipeError

_NAMED = ("model", "optimizer", "data", "data.source")  # an override of one of them can bring a bare name

_MOST_VALUES = 20_000


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file as plain data. Raises RecipeError."""
    try:
        text = Path(path).read_text()
        _refuse_bombs(text)
        raw = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except FileNotFoundError:
        near = sorted(str(other) for other in Path("yamls").glob("*.yaml"))
        raise RecipeError("", f"no such file; recipes here: {', '.join(near) or 'none'}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise RecipeError("", "is nested too deeply for a recipe") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError("", _one_line(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError("", "is not a mapping of keys to values")
    return raw  # pyright: ignore


def _refuse_bombs(text: str) -> None:
    """A few aliases of aliases can stand for more values than any memory holds. Raises RecipeError."""
    sizes: dict[int, float] = {}

    def size_of(node: yaml.Node | None) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # of a node that is within itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size_of, flat))
        return sizes[id(node)]

    if size_of(yaml.compose(text, Loader=yaml.SafeLoader)) > _MOST_VALUES:
        raise RecipeError("", f"stands for more than {_MOST_VALUES:,} values, through aliases of aliases; write it out")


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
            merged = _with_override(merged, *override.split("=", 1))
        _refuse_resolvers(OmegaConf.to_container(merged), path="")
        return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError("", _one_line(error)) from None


def _with_override(merged: Any, key: str, text: str) -> Any:
    """key: names joined by dots; an item of a list is named by its index, as stages[0]."""
    try:
        if "[" in key:
            OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={text}"])["value"], force_add=True)
        else:
            merged.merge_with(OmegaConf.from_dotlist([f"{key}={text}"]))
    except (TypeError, ValueError, LookupError, OmegaConfBaseException) as error:
        raise RecipeError(key, f"cannot be {text}: {_one_line(error)}") from None
    if key in _NAMED:
        return OmegaConf.create(with_names(OmegaConf.to_container(merged)))
    return merged


def _refuse_resolvers(value: Any, *, path: str) -> None:
    """${key} is another key's value. ${name:...} calls a function, and its result would be written to recipe.yaml."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_resolvers(item, path=f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_resolvers(item, path=f"{path}[{index}]")
    elif isinstance(value, str) and (call := re.search(r"\$\{[^${}]*:.*", value)):
        raise RecipeError(
            path,
            f"has {call[0]}, which would read the environment or call a function, and be written down with its result; "
            f"let the shell fill it in: {path}=$NAME",
        )


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
