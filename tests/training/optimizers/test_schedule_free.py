"""Schedule-free optimizers against the paper's three sequences and pytorch_optimizer's, and where runs switch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_muon import give_gradients, weights
from torch import nn

from training.optimizers import build_optimizer, check_settings, settings_of
from training.optimizers.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD, averages_of
from training.recipe.schema import parse

RATES = (0.0, 0.05, 0.1, 0.1, 0.1)  # with a warm-up
SHAPES = ((3, 4), (5,))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_follow_the_papers_sequences(kind: str) -> None:
    made = weights(*SHAPES, dtype=torch.float64)
    beta, decay = 0.8, 0.02
    settings: Any = {"momentum": beta} if kind == "sgd" else {"betas": (beta, 0.95), "eps": 1e-6}
    classes: Any = {"sgd": ScheduleFreeSGD, "adamw": ScheduleFreeAdamW}
    optimizer = classes[kind](made, lr=0.1, weight_decay=decay, **settings)
    z = [one.detach().clone() for one in made]
    x, second = [one.clone() for one in z], [torch.zeros_like(one) for one in z]
    total = 0.0
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        give_gradients(made, step)
        optimizer.step()
        total += max(RATES[: step + 1]) ** 2
        share = max(RATES[: step + 1]) ** 2 / total if total else 0.0
        for index, one in enumerate(made):
            assert one.grad is not None
            y, direction = (1 - beta) * z[index] + beta * x[index], one.grad
            if kind == "adamw":
                second[index] = 0.95 * second[index] + 0.05 * direction**2
                direction = direction / ((second[index] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
            z[index] = z[index] - rate * (direction + decay * y)
            x[index] = (1 - share) * x[index] + share * z[index]
            y = (1 - beta) * z[index] + beta * x[index]
            torch.testing.assert_close(one.detach(), y, rtol=0, atol=1e-12)
    optimizer.eval()
    for one, average in zip(made, x, strict=True):
        torch.testing.assert_close(one.detach(), average, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_steps_are_those_of_pytorch_optimizer(kind: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    mine = weights(*SHAPES, dtype=torch.float64)
    theirs = copy.deepcopy(mine)
    classes: Any = {"SGD": ScheduleFreeSGD, "AdamW": ScheduleFreeAdamW}
    ours = classes[kind](mine, lr=0.1, weight_decay=0.02)
    other = getattr(library, f"ScheduleFree{kind}")(theirs, lr=0.1, weight_decay=0.02)
    for step in range(5):
        for parameters, optimizer in ((mine, ours), (theirs, other)):
            give_gradients(parameters, step)
            optimizer.step()
    for switch in ("train", "eval"):
        for optimizer in (ours, other):
            getattr(optimizer, switch)()
        for one, reference in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, reference, rtol=0, atol=1e-12)


def test_an_evaluation_changes_no_bit_and_may_be_asked_for_twice() -> None:
    made = weights(*SHAPES)
    optimizer = ScheduleFreeSGD(made, lr=0.1)
    optimizer.eval()  # before the first step there is no average
    optimizer.train()
    for step in range(3):
        give_gradients(made, step)
        optimizer.step()
    before = [one.detach().clone() for one in made]
    optimizer.eval()
    optimizer.eval()
    assert not torch.equal(made[0], before[0])
    optimizer.train()
    optimizer.train()
    assert all(torch.equal(one, other) for one, other in zip(made, before, strict=True))


def test_a_saved_state_continues_bit_for_bit_and_gives_the_averages() -> None:
    first, second = weights(*SHAPES), weights(*SHAPES)
    whole, cut = ScheduleFreeAdamW(first, lr=0.1), ScheduleFreeAdamW(second, lr=0.1)
    for step in range(5):
        if step == 2:
            cut = ScheduleFreeAdamW(second, lr=0.1)
            cut.load_state_dict(copy.deepcopy(whole.state_dict()))
        for parameters, optimizer in ((first, whole), (second, cut)):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    names = ["a", "b"]
    z = {name: whole.state[one]["z"] for name, one in zip(names, first, strict=True)}
    held = {name: one.detach().clone() for name, one in zip(names, first, strict=True)}
    whole.eval()
    averages = averages_of(held, z, [{**whole.param_groups[0], "params": names}])
    assert all(torch.equal(averages[name], one) for name, one in zip(names, first, strict=True))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("schedule_free_sgd", {"momentum": 0}, "momentum is 0, and gradients are taken between"),
        ("schedule_free_adamw", {"betas": [0.0, 0.9]}, r"betas\[0\] is 0, and gradients are taken between"),
        ("schedule_free_adamw", {"eps": -1}, "eps is -1.0; it must be at least 0"),
    ],
)
def test_mistakes_are_told(name: str, given: dict[str, Any], says: str) -> None:
    settings = {"name": name, **parse(settings_of(name), {"learning_rate": 0.1, **given}, path="optimizer")}
    with pytest.raises(ValueError, match=says):
        check_settings(settings)


def test_norms_do_not_decay() -> None:
    parsed = parse(settings_of("schedule_free_sgd"), {"learning_rate": 0.1, "weight_decay": 0.1}, path="optimizer")
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    made = build_optimizer(network, {"name": "schedule_free_sgd", **parsed}, learning_rate=0.1)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
