"""The key compile: a switch, or a mapping of settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from training.recipe.schema import RecipeError, parse

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # on GPUs these record CUDA graphs


@dataclass(frozen=True)
class Compile:
    """How the model is compiled. mode: torch.compile's. ahead: every graph of the run before its first step."""

    mode: Mode = "default"
    ahead: bool = True


@dataclass
class _Switch:
    compile: bool = False


def parse_compile(given: Any) -> dict[str, Any] | Literal[False]:
    """The settings with their defaults, False if nothing is compiled. Raises RecipeError."""
    if isinstance(given, dict):
        return parse(Compile, given, path="compile")
    if given in get_args(Mode):
        raise RecipeError("compile", f"is {given!r}, which is a mode; give compile.mode={given}")
    try:
        on = parse(_Switch, {"compile": given if given is not None else False}, path="")["compile"]
    except RecipeError:
        raise RecipeError(
            "compile", f"is {given!r}; it must be true or false, or a mapping with the keys mode, ahead"
        ) from None
    return asdict(Compile()) if on else False
