"""load= refuses a state that is not this network's and optimizer's, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import quiet

from training import session
from training.guards.finite import NotFinite
from training.recipe import RecipeError

PLAIN = (
    "algorithms=null", "duration.epochs=1", "data.train.image_size=8", "data.eval.image_size=8", "model.width=4",
    "schedule.warmup_epochs=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("fitting")}


@pytest.fixture
def saved(short_recipe: Any, written: dict[str, Path]) -> dict[str, Any]:
    """What a run wrote, anew for each test."""
    path = written["folder"] / "latest.pt"
    if not path.exists():
        run = short_recipe(*PLAIN, "run_name=first")
        session.train(run, say=quiet)
        path.write_bytes((run.run_dir / "checkpoints" / "latest.pt").read_bytes())
    return torch.load(path, weights_only=False)


def a_weight_less(state: dict[str, Any]) -> None:
    state["model"].pop(next(iter(state["model"])))


def a_weight_more(state: dict[str, Any]) -> None:
    state["model"]["module.another.weight"] = torch.zeros(3)


def another_shape(state: dict[str, Any]) -> None:
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name][:1]


def no_optimizer(state: dict[str, Any]) -> None:
    del state["optimizers"]


def an_empty_optimizer(state: dict[str, Any]) -> None:
    state["optimizers"] = {}


def another_optimizer(state: dict[str, Any]) -> None:
    state["optimizers"] = {"AdamW": next(iter(state["optimizers"].values()))}


def no_model(state: dict[str, Any]) -> None:
    del state["model"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_weight_less, r"lacks the weights \S+"),
        (a_weight_more, r"has weights that this network does not: module\.another\.weight"),
        (another_shape, r"has weights of other shapes: \S+, \[1, .*\] there and \[4, .*\] here"),
        (no_optimizer, r"lacks the state of the optimizer, SGD \(it has none\)"),
        (an_empty_optimizer, r"lacks the state of the optimizer, SGD \(it has none\)"),
        (another_optimizer, r"lacks the state of the optimizer, SGD \(it has AdamW\)"),
        (no_model, "holds no state of a run"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_first_name(
    saved: dict[str, Any], change: Callable[[dict[str, Any]], None], reason: str, short_recipe: Any, tmp_path: Path
) -> None:
    change(saved["state"])
    torch.save(saved, tmp_path / "changed.pt")
    with pytest.raises(RecipeError, match=rf"load: is {tmp_path}/changed\.pt, which {reason}.* Continue with"):
        session.train(short_recipe(*PLAIN, "run_name=second", f"load={tmp_path / 'changed.pt'}"), say=quiet)


@pytest.mark.timeout(120)
def test_weights_that_are_no_numbers_are_refused(saved: dict[str, Any], short_recipe: Any, tmp_path: Path) -> None:
    for value in saved["state"]["model"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    saved["state"]["timestamp"]["Timestamp"]["epoch"] = 0
    torch.save(saved, tmp_path / "nan.pt")
    recipe = short_recipe(*PLAIN, "run_name=second", f"load={tmp_path / 'nan.pt'}", "duration.epochs=2")
    with pytest.raises(NotFinite, match="are not finite before the first step; start from another checkpoint"):
        session.train(recipe, say=quiet)
