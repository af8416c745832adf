"""Parses plain data into typed settings, by dataclasses and signatures, with one-line errors.

OmegaConf converts and checks every single value; this module walks the structure, so that each error can name the whole
path, the given value, what is allowed and the nearest match.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MOST_CHARACTERS = 4000  # of an error; the longest that names all choices has some 2,000


class RecipeError(ValueError):
    """A user's mistake in a recipe: `path` is the key it is about, and the text says what is allowed."""

    def __init__(self, path: str, message: str) -> None:
        path, message = _one_line(path), _one_line(message)
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.message = message


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field accepts, given with its type: `Annotated[float, Range(above=0, maximum=1)]`.

    minimum and maximum are inclusive, `above` is exclusive. note: what the minimum means, appended to it in messages.
    """

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    note: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    def __str__(self) -> str:
        if self.maximum is None:
            return f"be at least {self.minimum}{self.note}" if self.above is None else f"be above {self.above}"
        return f"lie in {f'[{self.minimum}' if self.above is None else f'({self.above}'}, {self.maximum}]"


@contextlib.contextmanager
def users_mistake(path: str) -> Iterator[None]:
    """Turn a lower layer's error about a user's mistake into one that names the recipe's key."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise RecipeError(path, str(error)) from error


def schema_of(factory: Callable[..., Any], *, without: Sequence[str] = ()) -> type:
    """A dataclass with a field for every keyword argument of `factory` (a class or a function).

    Arguments named in `without` are left out: the program gives them, not the recipe.
    """
    function: Callable[..., Any] = factory.__init__ if inspect.isclass(factory) else factory  # pyright: ignore
    hints = get_type_hints(function)
    fields: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(factory).parameters.items():
        if name in without or parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        default = MISSING if parameter.default is parameter.empty else parameter.default
        fields.append((name, _of_recipes(hints.get(name, Any)), dataclasses.field(default=default)))
    return dataclasses.make_dataclass(getattr(factory, "__name__", "Settings"), fields, kw_only=True)


def parse(schema: type, given: Any, *, path: str) -> dict[str, Any]:
    """The fields of dataclass `schema` filled from the mapping `given`: checked, converted, defaults filled in.

    Nested dataclasses become nested mappings, lists of dataclasses lists of instances. Raises RecipeError.
    """
    if given is None or isinstance(given, schema):  # an instance is a field's default, with all its own defaults
        given = {}
    if not isinstance(given, dict):
        raise RecipeError(path, f"is {given!r}; it must be a mapping with the keys {_listed(_field_names(schema))}")
    hints = get_type_hints(schema, include_extras=True)
    _refuse_unknown_keys(given, _field_names(schema), path=path)
    parsed = {}
    for field in dataclasses.fields(schema):
        where = f"{path}.{field.name}" if path else field.name
        value = given.get(field.name, _default(field))
        if isinstance(value, str) and value == MISSING:
            raise RecipeError(where, f"is missing; give {_described(hints[field.name])}")
        parsed[field.name] = _parse_value(hints[field.name], value, path=where)
    return parsed


def refuse_unknown(name: Any, known: Sequence[str], *, path: str, what: str) -> None:
    """Raise RecipeError unless `name` is one of `known`, with the nearest match."""
    if name not in known:
        raise RecipeError(path, f"{name!r} is no {what}; known: {_listed(known)}{_nearest(name, known)}")


def _parse_value(hint: Any, value: Any, *, path: str) -> Any:
    optional, hint = _strip_optional(hint)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, value, path=path)
    item = get_args(hint)[0] if get_origin(hint) is list else None
    if isinstance(item, type) and dataclasses.is_dataclass(item):
        return _parse_list(item, value, path=path)
    if hint is Any:
        return value
    hint, allowed = _strip_ranges(hint)
    converted = _convert(hint, value, path=path)
    for one in allowed:
        if converted not in one:
            raise RecipeError(path, f"is {converted}; it must {one}")
    return converted


def _parse_list(item: type, value: Any, *, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(
            path, f"is {_shown(value)}; it must be a list of mappings with the keys {_listed(_field_names(item))}"
        )
    made = []
    for index, entry in enumerate(value):
        if isinstance(entry, item):
            made.append(entry)
            continue
        where = f"{path}[{index}]"
        try:
            made.append(item(**parse(item, entry, path=where)))
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(where, str(error)) from None
    return made


def _convert(hint: Any, value: Any, *, path: str) -> Any:
    leaf = dataclasses.make_dataclass("Leaf", [("value", hint, dataclasses.field(default=MISSING))])
    try:
        converted = OmegaConf.merge(OmegaConf.structured(leaf), {"value": value})
        return OmegaConf.to_container(converted)["value"]  # pyright: ignore
    except (OmegaConfBaseException, TypeError, ValueError, ArithmeticError):  # of what is nothing like the hint
        choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
        raise RecipeError(
            path, f"is {_shown(value)}; it must be {_described(hint)}{_nearest(value, choices)}"
        ) from None


def _shown(value: Any) -> str:
    """As a recipe has it: null, not None."""
    return "null" if value is None else repr(value)


def _of_recipes(hint: Any) -> Any:
    """`hint` without the objects of programs that an argument may be too: str of str | nn.Module."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    parts = [part for part in get_args(hint) if not _is_program(part)]
    return Union[tuple(parts)]  # noqa: UP007


def _is_program(hint: Any) -> bool:
    return isinstance(hint, type) and hint.__module__.partition(".")[0] == "torch"


def _refuse_unknown_keys(given: dict[Any, Any], known: Sequence[str], *, path: str) -> None:
    for key in given:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            allowed = _listed(known) if known else "none, it takes no settings"
            raise RecipeError(where, f"unknown key (given {given[key]!r}); allowed: {allowed}{_nearest(key, known)}")


def _strip_optional(hint: Any) -> tuple[bool, Any]:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return len(inner) < len(get_args(hint)), inner[0] if len(inner) == 1 else Union[tuple(inner)]  # noqa: UP007
    return False, hint


def _strip_ranges(hint: Any) -> tuple[Any, tuple[Range, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _described(hint: Any) -> str:
    optional, hint = _strip_optional(hint)
    hint, _ = _strip_ranges(hint)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) is Literal:
        text = "one of " + _listed([str(choice) for choice in get_args(hint)])
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        text = "a mapping with the keys " + _listed(_field_names(hint))
    elif get_origin(hint) is tuple:
        inner = [arg for arg in get_args(hint) if arg is not Ellipsis]
        count = "any number" if Ellipsis in get_args(hint) else str(len(inner))
        text = f"a list of {count} values, each {_described(inner[0])}"
    elif get_origin(hint) in (Union, types.UnionType):
        text = " or ".join(_described(part) for part in get_args(hint))
    elif get_origin(hint) is list:
        text = f"a list, each item {_described(get_args(hint)[0])}"
    else:
        text = words.get(hint, str(hint))
    return f"{text}, or null" if optional else text


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else MISSING


def _field_names(schema: type) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def _nearest(given: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(text: str) -> str:
    """What a recipe gives may be of any length and have line breaks, or characters that no terminal can print."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} ..."
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
