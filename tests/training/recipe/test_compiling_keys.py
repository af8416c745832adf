"""The key compile: a switch or a mapping, from files and the command line; CUDA graphs where they are sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.planning import choose_place
from training.planning import place as planning
from training.recipe import RecipeError, load_recipe
from training.recipe.compiling import Compile

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"


@pytest.mark.parametrize(
    ("in_file", "overrides", "expected"),
    [
        (None, [], None),
        ("null", [], None),
        ("true", [], Compile()),
        ("{}", [], Compile()),
        ("true", ["compile.mode=max-autotune"], Compile(mode="max-autotune")),
        ("false", ["compile.ahead=false"], Compile(ahead=False)),
        ("{mode: max-autotune, ahead: false}", ["compile.ahead=true"], Compile(mode="max-autotune")),
        ("{mode: max-autotune}", ["compile=false"], None),
        ("{mode: max-autotune}", ["compile=null"], None),
    ],
)
def test_the_key_is_a_switch_or_a_mapping(
    tmp_path: Path, in_file: str | None, overrides: list[str], expected: Compile | None
) -> None:
    above = tmp_path / "above.yaml"
    above.write_text(f"compile: {in_file}\n" if in_file else "seed: 1\n")
    recipe = load_recipe([DIGITS, above], overrides)
    assert recipe.compile == expected
    # What a run writes to recipe.yaml is read again as the same.
    again = load_recipe(DIGITS, [f"compile={recipe.settings['compile']}".replace("'", "")])
    assert again.compile == expected


@pytest.mark.parametrize("override", ["compile.modes=default", "compile=[1]", "compile.ahead=maybe"])
def test_other_values_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="compile"):
        load_recipe(DIGITS, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compile.mode=reduce-overhead"], None),
        (["compile.mode=max-autotune-no-cudagraphs", "data.train.per_device_microbatch_size=8"], None),
        (
            ["compile.mode=reduce-overhead", "data.train.per_device_microbatch_size=8"],
            "over those of the one before.*; use default, or set that to null$",
        ),
        (["compile.mode=max-autotune", "parallelism.strategy=fsdp"], "use max-autotune-no-cudagraphs, or ddp$"),
    ],
)
def test_cuda_graphs_are_refused_where_memory_moves(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str | None
) -> None:
    monkeypatch.setattr(planning.torch.cuda, "is_available", lambda: True)
    recipe: Any = load_recipe(DIGITS, [*overrides, "device=gpu"])
    if message is None:
        assert choose_place(recipe).device == "gpu"
        return
    with pytest.raises(RecipeError, match=f"^compile.mode: .*{message}"):
        choose_place(recipe)
