"""A recipe's file as plain data, with the command line's overrides applied."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.recipe.schema import RecipeError

_NAMED = ("model", "loss", "optimizer", "data", "data.source")  # an override of one of them can bring a bare name

# Limits that no recipe comes near, within which reading one takes little time and memory.
_MOST_BYTES = 1_000_000
_MOST_VALUES = 20_000
_MOST_LEVELS = 50
_MOST_REFERENCES = 8  # each of which can stand for as much as all the others together
_MOST_BITS = 64
_MOST_QUOTED = 200


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file as plain data. Raises RecipeError."""
    try:
        with open(path, "rb") as file:  # which may be a device, or a pipe, without a size
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise RecipeError("", f"has more than {_MOST_BYTES:,} bytes, and no recipe is as long")
        text = content.decode()
        _refuse_bombs(text)
        raw = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except FileNotFoundError:
        near = sorted(str(other) for other in Path("yamls").glob("*.yaml"))
        raise RecipeError("", f"no such file; recipes here: {', '.join(near) or 'none'}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise RecipeError("", "is nested too deeply for a recipe") from None
    except RecipeError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError("", _one_line(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError("", "is not a mapping of keys to values")
    _refuse_huge_numbers(raw, path="")
    return raw  # pyright: ignore


def _refuse_bombs(text: str) -> None:
    """A few aliases of aliases can stand for more values than any memory holds. Raises RecipeError."""
    sizes: dict[int, tuple[float, float]] = {}

    def size_of(node: yaml.Node | None) -> tuple[float, float]:
        """Values and levels."""
        if id(node) not in sizes:
            sizes[id(node)] = math.inf, math.inf  # of a node that is within itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [size_of(part) for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(values for values, _ in flat), 1 + max((levels for _, levels in flat), default=0)
        return sizes[id(node)]

    values, levels = size_of(yaml.compose(text, Loader=yaml.SafeLoader))
    if values > _MOST_VALUES:
        raise RecipeError("", f"stands for more than {_MOST_VALUES:,} values, through aliases of aliases; write it out")
    if levels > _MOST_LEVELS:
        raise RecipeError("", f"is nested too deeply for a recipe, {levels:.0f} levels")


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
        written = OmegaConf.to_container(merged)
        _refuse_resolvers(written, path="")
        _refuse_huge_numbers(written, path="")
        return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise RecipeError("", _one_line(error)) from None


def _with_override(merged: Any, key: str, text: str) -> Any:
    """key: names joined by dots; an item of a list is named by its index, as stages[0]."""
    try:
        _refuse_bombs(text)
        if "[" in key:
            OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={text}"])["value"], force_add=True)
        else:
            merged.merge_with(OmegaConf.from_dotlist([f"{key}={text}"]))
    except (TypeError, ValueError, LookupError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise RecipeError(key, f"cannot be {text[:_MOST_QUOTED]}: {_one_line(error)}") from None
    if key in _NAMED:
        return OmegaConf.create(with_names(OmegaConf.to_container(merged)))
    return merged


def _refuse_resolvers(written: Any, *, path: str) -> None:
    """${key} is another key's value. ${name:...} calls a function, and its result would be written to recipe.yaml.

    References to references can also stand for more than any memory holds.
    """
    references = 0
    for where, value in _leaves(written, path):
        if not isinstance(value, str):
            continue
        if call := re.search(r"\$\{[^${}]*:.*", value, re.DOTALL):
            raise RecipeError(
                where,
                f"has {call[0]}, which would read the environment or call a function, and be written down with its "
                f"result; let the shell fill it in: {where}=$NAME",
            )
        references += value.count("${")
        if references > _MOST_REFERENCES:
            raise RecipeError(
                where, f"has one reference ${{...}} more than the {_MOST_REFERENCES} of a recipe; write it out"
            )


def _refuse_huge_numbers(written: Any, *, path: str) -> None:
    """Python cannot even say one of thousands of digits."""
    for where, value in _leaves(written, path):
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise RecipeError(
                where, f"is a whole number of {value.bit_length()} bits; no key takes one beyond {_MOST_BITS}"
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each value that is neither a mapping nor a list, keys of mappings too, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def with_names(raw: Any) -> Any:
    """`model: resnet18` written out as `model: {name: resnet18}`, so that an override adds a setting to either."""
    if not isinstance(raw, dict):
        return raw
    named = {key: {"name": raw[key]} for key in ("model", "loss", "optimizer") if isinstance(raw.get(key), str)}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("source"), str):
        named["data"] = {**data, "source": {"name": data["source"]}}
    return {**raw, **named}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
