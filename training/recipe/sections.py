"""The sections of a recipe that name something, whose settings are checked against its signature.

Each function returns the section with its defaults filled in, and raises RecipeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from training.recipe.composers_own import refusal
from training.recipe.schema import RecipeError, parse, refuse_unknown, schema_of

_AVERAGING = frozenset({"ema", "composer.ema", "composer.swa"})


def parse_model(given: Any) -> dict[str, Any]:
    """The section model: a network's name, and its settings with their defaults."""
    from models import registry

    name, settings = _split_name(given, path="model")
    try:
        factory = registry.find(name)
    except ValueError as error:
        raise RecipeError("model.name", str(error)) from None
    return {"name": name, **parse(schema_of(factory, without=("num_classes",)), settings, path="model")}


def parse_source(given: Any) -> dict[str, Any]:
    """The section data.source: a source's name, and its settings with their defaults."""
    from data.sources import SOURCES

    name, settings = _split_name(given, path="data.source")
    refuse_unknown(name, sorted(SOURCES), path="data.source.name", what="source")
    return {"name": name, **parse(schema_of(SOURCES[name], without=("split",)), settings, path="data.source")}


@dataclass
class _Loss:
    name: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    class_weights: Any = None


def parse_loss(given: Any) -> str | dict[str, Any]:
    """The section loss: its name if all classes weigh the same, else a mapping with class_weights, auto or a list."""
    parsed = parse(_Loss, given if isinstance(given, dict) else {"name": given}, path="loss")
    weights, path = parsed["class_weights"], "loss.class_weights"
    if weights in (None, "none"):
        return parsed["name"]
    if isinstance(weights, list) and all(type(one) in (int, float) for one in weights):
        from models.losses import check_class_weights

        try_settings(check_class_weights, {"class_weights": weights}, path=path)
    elif weights != "auto":
        raise RecipeError(path, f"is {weights!r}; it must be auto, none, or a list with a number for each class")
    return parsed


def parse_optimizer(given: Any) -> dict[str, Any]:
    """The section optimizer: a name, and its settings with their defaults."""
    from training.optimizers import check_settings, settings_of

    name, settings = _split_name(given, path="optimizer")
    try:
        schema = settings_of(name)
    except ValueError as error:
        raise RecipeError("optimizer.name", str(error)) from None
    parsed = {"name": name, **parse(schema, settings, path="optimizer")}
    if name == "muon":
        parsed["others"] = _parse_others(parsed["others"])
    try_settings(check_settings, {"settings": parsed}, path="optimizer")
    return parsed


def _parse_others(given: Any) -> dict[str, Any]:
    """Muon's optimizer of the weights that are no hidden matrices."""
    from training.optimizers import OTHERS, check_settings, settings_of

    path = "optimizer.others"
    name, settings = _split_name(given, path=path)
    refuse_unknown(name, OTHERS, path=f"{path}.name", what="optimizer of muon's other weights")
    parsed = {"name": name, **parse(settings_of(name), settings, path=path)}
    try_settings(check_settings, {"settings": parsed}, path=path)
    if parsed["clip_norm"] is not None:
        raise RecipeError(f"{path}.clip_norm", f"is {parsed['clip_norm']:g}; give optimizer.clip_norm, which clips all")
    return parsed


def check_schedule_free(top: dict[str, Any]) -> None:
    """Raise RecipeError for what goes wrong with an optimizer that averages the weights itself."""
    from training.optimizers import SCHEDULE_FREE

    name = top["optimizer"]["name"]
    if name not in SCHEDULE_FREE:
        return
    if top["schedule"]["decay"] != "constant":
        raise RecipeError(
            "schedule.decay",
            f"is {top['schedule']['decay']}, and optimizer {name} averages the weights in place of a decay; set "
            "schedule.decay=constant (a warm-up may stay)",
        )
    on = {one for one, settings in top["algorithms"].items() if settings is not None}
    for other in sorted(on & _AVERAGING):
        raise RecipeError(
            f"algorithms.{other}", f"averages the weights too, as optimizer {name} does; drop one of the two"
        )
    if "fixres" in on:
        raise RecipeError(
            "algorithms.fixres",
            f"trains last layers at a rate of their own, and optimizer {name} needs the same rate up to the end; set "
            "algorithms.fixres=null, or use another optimizer",
        )
    resizing = top["algorithms"].get("progressive_resizing") or {}
    sizes = ("per_device_batch_size", "global_batch_size")
    if any(getattr(stage, size, None) for stage in resizing.get("stages") or () for size in sizes) and (
        resizing["learning_rate_scaling"] != "none"
    ):
        raise RecipeError(
            "algorithms.progressive_resizing.learning_rate_scaling",
            f"is {resizing['learning_rate_scaling']}, and optimizer {name} needs the same rate up to the end; set it "
            "to none",
        )


def parse_algorithms(given: Any) -> dict[str, dict[str, Any] | None]:
    """The section algorithms: the settings of each, with their defaults; None for one that is off."""
    from algos.framework import registry
    from algos.framework.composer_algorithms import PREFIX, refuse_doubles

    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError("algorithms", f"is {given!r}; it must be a mapping of names to settings")
    parsed: dict[str, dict[str, Any] | None] = {}
    for name, settings in _name_composers(given).items():
        where = f"algorithms.{name}"
        composers = isinstance(name, str) and name.startswith(PREFIX)  # YAML's keys may be numbers
        known = registry.composer_names() if composers else [*registry.names(), "composer"]
        refuse_unknown(name, known, path=where, what="algorithm")
        if settings is None:
            parsed[name] = None
        elif composers:  # see try_composers
            parsed[name] = arguments = _mapping(settings, where)
            reason = refusal(name, arguments)
            if reason is not None:
                raise RecipeError(where, reason)
        else:
            parsed[name] = arguments = parse(schema_of(registry.find(name)), settings, path=where)
            try_settings(registry.planner(name), arguments, path=where)
    try:
        refuse_doubles(name for name, settings in parsed.items() if settings is not None)
    except ValueError as error:
        raise RecipeError("algorithms", str(error)) from None
    return parsed


def try_composers(algorithms: dict[str, dict[str, Any] | None]) -> None:
    """Check the settings of Composer's own algorithms; imports Composer if there are any."""
    from algos.framework import registry
    from algos.framework.composer_algorithms import PREFIX

    for name, settings in algorithms.items():
        if settings is not None and name.startswith(PREFIX):
            try_settings(registry.maker(name), settings, path=f"algorithms.{name}")


def _name_composers(given: dict[str, Any]) -> dict[str, Any]:
    """Composer's own are in the section algorithms.composer; from here on each is named composer.ema and so on."""
    named = {name: settings for name, settings in given.items() if name != "composer"}
    for name, settings in _mapping(given.get("composer"), "algorithms.composer").items():
        if f"composer.{name}" in named:
            raise RecipeError(f"algorithms.composer.{name}", "given twice, in the section composer and outside of it")
        named[f"composer.{name}"] = settings
    return named


def _mapping(given: Any, path: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise RecipeError(path, f"is {given!r}; it must be a mapping")
    return dict(given or {})


def try_settings(factory: Callable[..., Any], arguments: dict[str, Any], *, path: str) -> None:
    """Call `factory` once, so that values out of range are found with the rest of the recipe."""
    try:
        factory(**arguments)
    except ValueError as error:
        raise RecipeError(path, str(error)) from None


def _split_name(given: Any, *, path: str) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise RecipeError(f"{path}.name", f"is missing (given {given!r}); name one and put its settings beside it")
    return given["name"], {key: value for key, value in given.items() if key != "name"}
