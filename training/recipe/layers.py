"""Several files, the later lying over the earlier: a recipe and, over it, what depends on the machine.

Mappings are merged key by key; anything else, lists too, is replaced. Two exceptions spare a later file from repeating
the recipe under it:

    algorithms.progressive_resizing.stages  may be a mapping from image size to keys of a stage, instead of a list. The
        row of N px lies over every stage of up to N px, down to the next smaller row. Stages that give no batch size
        keep none: they train at the run's own, for which the learning rate was chosen. Without a list of stages beneath
        it the mapping has no effect.
    global_batch_size and per_device_batch_size  exclude each other, so giving one takes away the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.recipe.schema import RecipeError

_BATCH_SIZES = ("global_batch_size", "per_device_batch_size")
_RESIZING = "progressive_resizing"


def lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, neither of which is changed. Raises RecipeError for rows that are no stages' rows."""
    above = _with_stages(below, above)
    return _merged(below, above)


def blamed_file(error_path: str, files: Sequence[tuple[str | Path, Mapping[str, Any]]]) -> str:
    """The file to name in an error about the key `error_path`: the last one that gives it, or else the first file."""
    keys = error_path.partition("[")[0].split(".") if error_path else []
    while keys:
        for path, raw in reversed(files):
            if _holds(raw, keys):
                return str(path)
        keys = keys[:-1]
    return " + ".join(str(path) for path, _ in files)


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    kept = {key: value for key, value in below.items() if not _replaced(key, above)}
    return {**kept, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _replaced(key: Any, above: Mapping[Any, Any]) -> bool:
    given = [name for name in _BATCH_SIZES if above.get(name) is not None]
    return key in _BATCH_SIZES and bool(given) and key not in given


def _with_stages(below: Mapping[str, Any], above: Mapping[str, Any]) -> Mapping[str, Any]:
    """`above` with its rows by image size written out as the whole list of stages."""
    resizing = _section(_section(above, "algorithms"), _RESIZING)
    rows = resizing.get("stages")
    if not isinstance(rows, Mapping):
        return above
    for size, row in rows.items():
        _check_row(size, row)
    beneath = _section(_section(below, "algorithms"), _RESIZING).get("stages")
    others = {key: value for key, value in resizing.items() if key != "stages"}
    if isinstance(beneath, list):
        others["stages"] = [_with_row(stage, rows) for stage in beneath]
    algorithms = {key: value for key, value in above["algorithms"].items() if key != _RESIZING}
    if others:
        algorithms[_RESIZING] = others
    return {**above, "algorithms": algorithms}


def _check_row(size: Any, row: Any) -> None:
    where = f"algorithms.{_RESIZING}.stages"
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise RecipeError(where, f"has the row {size!r}; a row is named by an image size, a whole number of px")
    if not isinstance(row, Mapping):
        raise RecipeError(where, f"has {row!r} at {size} px; a row is a mapping, such as {{per_device_batch_size: 64}}")
    for key in row:
        if key not in _BATCH_SIZES:
            raise RecipeError(
                where, f"has {key} in the row of {size} px; a row may give {' or '.join(_BATCH_SIZES)} and nothing else"
            )


def _with_row(stage: Any, rows: Mapping[int, Mapping[str, Any]]) -> Any:
    if not isinstance(stage, Mapping) or not any(stage.get(name) for name in _BATCH_SIZES):
        return stage
    size = min((size for size in rows if size >= stage.get("image_size", 0)), default=None)
    return stage if size is None else _merged(stage, rows[size])


def _section(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def _holds(raw: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(raw, Mapping) or key not in raw:
            return False
        raw = raw[key]
    return True
